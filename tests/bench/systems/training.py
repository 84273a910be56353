"""The step of every system that has no trainer of its own: torch's AdamW, the whole gradient clipped at 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from tests.bench.case import Case
from tests.bench.systems.llama import step_ids

LEARNING_RATE = 1e-5
CLIP = 1.0


class AdamWStep:
    """Forward, backward, clip, optimizer, zero_grad.

    Args:
        case: the shapes.
        parameters: what trains.
        loss_of: mean loss of tokens ``[B, S]``.
        around: what the forward pass runs under.
        fused: whether the optimizer is torch's fused kernel.
    """

    def __init__(
        self,
        case: Case,
        parameters: Sequence[nn.Parameter],
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        around: Callable[[Case], AbstractContextManager[Any]] = lambda case: nullcontext(),
        *,
        fused: bool | None = None,
    ) -> None:
        self.case, self.parameters, self.loss_of, self.around = case, list(parameters), loss_of, around
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=fused)

    @property
    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def __call__(self, step: int) -> tuple[float, float]:
        with self.around(self.case):
            loss = self.loss_of(step_ids(self.case, step))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)


def mean_loss(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of a transformers model: the cross-entropy that a run of ours has too, for the same logits."""
    from dsmixer.losses.task import token_losses

    def loss_of(ids_BS: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids_BS, use_cache=False).logits
        return token_losses(logits, ids_BS).sum() / (ids_BS.numel() - ids_BS.shape[0])

    return loss_of
