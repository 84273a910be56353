"""Dropout whose mask follows from a seed: the backward pass makes the mask again instead of keeping it.

Shapes: T tokens, D input width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LEVELS = 2**16
"""A mask is a comparison of 16 random bits: to draw those is several times cheaper than Bernoulli numbers."""


@dataclass(frozen=True)
class Dropout:
    """One mask: ``y = x * kept / (1 - p)``, ``kept`` 0 with probability p, else 1.

    Attributes:
        probability: p, to 1/65536; ``scale`` is of p as it is drawn.
        seed: of the mask.
    """

    probability: float
    seed: int

    @classmethod
    def draw(cls, probability: float) -> Dropout:
        """A new mask; the seed is of torch's CPU generator, which checkpointing and resumed runs set back."""
        return cls(probability, int(torch.randint(2**63 - 1, (), device="cpu")))

    @property
    def _num_dropped(self) -> int:
        """Of the 65536 levels; at least one stays, whatever p."""
        return min(round(self.probability * LEVELS), LEVELS - 1)

    @property
    def scale(self) -> float:
        """``1 / (1 - p)``."""
        return LEVELS / (LEVELS - self._num_dropped)

    def kept(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The mask for a tensor of this shape on its device, bool: the same in every call."""
        generator = torch.Generator(device=x_TD.device).manual_seed(self.seed)
        words = torch.empty(-(-x_TD.numel() // 4), dtype=torch.int64, device=x_TD.device)
        words.random_(-(2**63), None, generator=generator)  # None: up to the largest, so that all 64 bits are
        levels = words.view(torch.int16)[: x_TD.numel()].view(x_TD.shape)
        return levels >= self._num_dropped - LEVELS // 2


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, dropout: Dropout) -> torch.Tensor:
        ctx.dropout = dropout
        return (x_TD * dropout.kept(x_TD)).mul_(dropout.scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        dropout: Dropout = ctx.dropout
        return (grads[0] * dropout.kept(grads[0])).mul_(dropout.scale), None


def drop(x_TD: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """``x * kept / (1 - p)``, which keeps the seed alone; None drops nothing."""
    if dropout is None:
        return x_TD
    dropped_TD: torch.Tensor = _Drop.apply(x_TD, dropout)
    return dropped_TD


class Masked:
    """The input as the experts see it; ``1 / (1 - p)`` is in ``s_E`` instead: float32, and no pass over x.

    Attributes:
        x_TD: without what is dropped.
        kept_TD: the mask, or None.
    """

    def __init__(self, x_TD: torch.Tensor, dropout: Dropout | None) -> None:
        self.kept_TD = None if dropout is None else dropout.kept(x_TD)
        self.x_TD = x_TD if self.kept_TD is None else x_TD * self.kept_TD

    def gradient(self, grad_TD: torch.Tensor | None) -> torch.Tensor | None:
        """Of the input, from that of what the experts saw; written over it."""
        return grad_TD if grad_TD is None or self.kept_TD is None else grad_TD.mul_(self.kept_TD)


def scaling_under(s_E: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """The experts' scaling with ``1 / (1 - p)`` in it."""
    # in float64, so that products in float64 are exact
    return s_E if dropout is None else s_E.double() * dropout.scale
