"""What one optimizer step updates, and how much of it in one tensor.

Shapes: U units, N reached rows of a span, X units of all its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from dsmixer.training.rows import Rows


@dataclass(frozen=True)
class Run:
    """Reached rows of a span that follow each other and have taken equally many steps: they are updated as
    one tensor.

    Attributes:
        places: in the span.
        taken: among the reached rows.
        step: the count of their steps, a scalar on the device.
        rate: their learning rate.
        clip_N1: the coefficient of each row's gradient; None where all are 1.
    """

    places: slice
    taken: slice
    step: torch.Tensor
    rate: float
    clip_N1: torch.Tensor | None


@dataclass
class Updates:
    """Rows that one call of torch's kernel updates, all with one learning rate."""

    weights: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    exp_avgs: list[torch.Tensor] = field(default_factory=list)
    exp_avg_sqs: list[torch.Tensor] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)

    def add(self, step: torch.Tensor, *four: torch.Tensor) -> None:
        """Weights, gradient and both moments of rows that have taken so many steps."""
        lists = (self.weights, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps)
        for to, tensor in zip(lists, (*four, step), strict=True):
            to.append(tensor)


@dataclass(frozen=True)
class StepOfUnits:
    """What a step does with each unit, U of them.

    Attributes:
        steps: the count of each, on the host.
        counts: the same as float32, on the device.
        clip_U: coefficients of their gradients, on the device.
        is_clipped: whether a coefficient is below 1, on the host.
        rates: learning rates.
        runs: of the spans that were asked for, by their units.
    """

    steps: torch.Tensor
    counts: torch.Tensor
    clip_U: torch.Tensor
    is_clipped: torch.Tensor
    rates: Sequence[float]
    runs: dict[tuple[int, ...], list[Run]] = field(default_factory=dict)

    def runs_of(self, units_X: torch.Tensor, rows: Rows) -> list[Run]:
        """The reached rows of a span of these units, in runs."""
        places_N = torch.tensor(rows.listed)
        units_N = units_X[places_N]
        steps_N = self.steps[units_N]
        cuts = ((places_N.diff() != 1) | (steps_N.diff() != 0)).nonzero().flatten() + 1
        bounds = [0, *cuts.tolist(), len(places_N)]
        clip_N1, is_clipped_N = self.clip_U[rows.units][:, None], self.is_clipped[units_N]
        found = []
        for begin, end in pairwise(bounds):
            unit, first = int(units_N[begin]), rows.listed[begin]
            found.append(
                Run(
                    places=slice(first, first + end - begin),
                    taken=slice(begin, end),
                    step=self.counts[unit],
                    rate=self.rates[unit],
                    clip_N1=clip_N1[begin:end] if bool(is_clipped_N[begin:end].any()) else None,
                )
            )
        return found
