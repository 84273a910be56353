"""The language-model loss as a weighted sum over target tokens.

Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED = -100


def shift_labels(labels_BS: torch.Tensor) -> torch.Tensor:
    """The target of each position: the label of the next one; the last position has none."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED)


def token_losses(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each position's next token, ``[B, S]`` nats, 0 where it has no target.

    Args:
        logits_BSV: the model's logits; computed on in float32 (float64 stays).
        labels_BS: the token at each position, -100 where it is no target.
    """
    if logits_BSV.dtype != torch.float64:
        logits_BSV = logits_BSV.float()
    targets_BS = shift_labels(labels_BS)
    losses = F.cross_entropy(
        logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets_BS)


def per_expert_weights(expert_ids_BS: torch.Tensor, target_counts_E: torch.Tensor) -> torch.Tensor:
    """``1 / N_e`` for each position, so that the weighted sum is each expert's own mean, ``[B, S]``.

    Args:
        expert_ids_BS: the expert of each position, -1 for none (weight 0).
        target_counts_E: target tokens of each expert in the whole optimizer step, over all ranks.
    """
    weights_E = torch.where(target_counts_E > 0, 1.0 / target_counts_E.clamp_min(1), 0.0)
    weights_E = weights_E.to(device=expert_ids_BS.device, dtype=torch.float32)
    return weights_E[expert_ids_BS.clamp_min(0)] * (expert_ids_BS >= 0)
