"""Routers that gain rows: what a row starts as, until training says where its expert is to speak.

Shapes: E experts that are there, N new ones, D input width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Start = Callable[[torch.Tensor, int, float, torch.Generator], torch.Tensor]
"""``(G [E, D], N, standard deviation of fresh routers, generator)`` to the new rows ``[N, D]``."""

NOISE = 1e-3
"""Of the others' spread: several new experts must not tie at every token."""


def mean_rows(weight_ED: torch.Tensor, num_new: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """The mean of the rows that are there, but for a thousandth of their spread; of one row, for ``std``.

    The logit of a new expert is then the mean of the others' logits at every token, and its probability their
    geometric mean: at most 1/(E+1), and next to nothing where the router is sure. It does not depend on what
    is added to all rows alike, which changes no probability.
    """
    mean_D = weight_ED.mean(0)
    spread = float((weight_ED - mean_D).square().mean().sqrt())
    noise_ND = torch.empty(num_new, weight_ED.shape[1]).normal_(generator=generator)
    return mean_D + (NOISE * spread if spread > 0 else std) * noise_ND


def zero_rows(weight_ED: torch.Tensor, num_new: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """Zeros: a logit of 0 at every token."""
    return weight_ED.new_zeros(num_new, weight_ED.shape[1])


def fresh_rows(weight_ED: torch.Tensor, num_new: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """As a router of a new mixture starts: a normal of standard deviation ``std``."""
    return torch.empty(num_new, weight_ED.shape[1]).normal_(0.0, std, generator=generator)


starts: Mapping[str, Start] = {"mean": mean_rows, "zero": zero_rows, "fresh": fresh_rows}
