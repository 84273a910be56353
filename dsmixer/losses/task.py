"""The language-model loss as a weighted sum over target tokens.

Shapes: B rows, S positions, N = B * S, V vocabulary.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

IGNORED = -100

BLOCK_ELEMENTS = 2**20
"""Logits that are made float32 at a time, where the loss does not run as one kernel."""


def shift_labels(labels_BS: torch.Tensor) -> torch.Tensor:
    """The target of each position: the label of the next one; the last position has none."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED)


def token_losses(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each position's next token: ``target_losses`` of the shifted labels, ``[B, S]``.

    Args:
        logits_BSV: the model's logits.
        labels_BS: the token at each position, -100 where it is no target.
    """
    return target_losses(logits_BSV, shift_labels(labels_BS))


def target_losses(logits_BSV: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of what each position has to predict, ``[B, S]`` nats, 0 where it has no target.

    Args:
        logits_BSV: the model's logits, kept as they are; computed on in float32, some rows at a time
            (float64 stays, and is computed at once).
        targets_BS: the token after each position, -100 where there is no target.
    """
    losses = _row_losses(logits_BSV.flatten(0, 1), targets_BS.flatten())
    return losses.view_as(targets_BS)


def _row_losses(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row; neither float32 logits nor their softmax are made or kept as a whole."""
    if logits_NV.dtype == torch.float64:
        return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")
    rows = max(1, BLOCK_ELEMENTS // logits_NV.shape[1])
    return _chunked()(logits_NV, targets_N, ignore_index=IGNORED, reduction="none", block_rows=rows)


@cache
def _chunked() -> Callable[..., torch.Tensor]:
    # the first import of deepspeed may write to standard output, where a program reads our JSON
    with contextlib.redirect_stdout(sys.stderr):
        from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
    found: Callable[..., torch.Tensor] = chunked_cross_entropy
    return found


def per_expert_weights(expert_ids_BS: torch.Tensor, target_counts_E: torch.Tensor) -> torch.Tensor:
    """``1 / N_e`` for each position, so that the weighted sum is each expert's own mean, ``[B, S]``.

    Args:
        expert_ids_BS: the expert of each position, -1 for none (weight 0).
        target_counts_E: target tokens of each expert in the whole optimizer step, over all ranks.
    """
    weights_E = torch.where(target_counts_E > 0, 1.0 / target_counts_E.clamp_min(1), 0.0)
    weights_E = weights_E.to(device=expert_ids_BS.device, dtype=torch.float32)
    return weights_E[expert_ids_BS.clamp_min(0)] * (expert_ids_BS >= 0)
