"""Signs that a run goes wrong though its numbers are finite: loss spikes, dead experts, collapsed routing."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dsmixer.config.schema import HealthConfig

if TYPE_CHECKING:
    from dsmixer.training.loop import StepReport

WINDOW = 50
"""Steps that a spike is held against, and the fewest before one is told."""
SPIKE_RATIO = 1.5
MOST_WARNINGS = 5
"""Of a kind, in a stage; the last one says that it is the last."""
SHOWN = 8


class Symptoms:
    """Watches the steps of one stage, on rank 0.

    Args:
        health: the limits.
        experts: names of the pool.
        routers: names of the routers.
    """

    def __init__(self, health: HealthConfig, experts: Sequence[str], routers: Sequence[str]) -> None:
        self._health, self._experts, self._routers = health, experts, routers
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._unreached_E = torch.zeros(len(experts), dtype=torch.int64)
        self._told_dead: set[int] = set()
        self._top1_ME = torch.zeros(len(routers), len(experts), dtype=torch.float64)
        self._steps = 0
        self._told: dict[str, int] = {}

    def look(self, report: StepReport) -> list[str]:
        """Warnings that this step gives rise to, one line each; mostly none."""
        if not self._health.warnings or report.skipped:
            return []
        found = self._spike(report.step, report.loss)
        if report.statistics is not None and len(self._experts) > 1:
            assert report.chosen_E is not None
            found += self._dead(report.chosen_E) + self._collapse(report.statistics.top1_ME)
        return found

    def _spike(self, step: int, loss: float) -> list[str]:
        window = list(self._losses)
        self._losses.append(loss)
        if len(window) < WINDOW:
            return []
        mean, spread = statistics.fmean(window), statistics.pstdev(window)
        if loss <= max(mean + self._health.loss_spike * spread, SPIKE_RATIO * mean):
            return []
        return self._bounded(
            "spike",
            f"the loss of step {step} is {loss:.4f}, and the {WINDOW} steps before had "
            f"{mean:.4f} ± {spread:.4f}",
        )

    def _dead(self, chosen_E: torch.Tensor) -> list[str]:
        self._unreached_E = torch.where(chosen_E > 0, 0, self._unreached_E + 1)
        self._told_dead -= set((chosen_E > 0).nonzero().flatten().tolist())
        dead = set((self._unreached_E >= self._health.dead_after).nonzero().flatten().tolist())
        new = sorted(dead - self._told_dead)
        self._told_dead |= dead
        if not new:
            return []
        return self._bounded(
            "dead",
            f"no token has been routed to {_listed([self._experts[e] for e in new])} in the last "
            f"{self._health.dead_after} steps",
        )

    def _collapse(self, top1_ME: torch.Tensor) -> list[str]:
        """Looks at ``dead_after`` steps together: the first choices of one step may well agree. Until then
        they are added up where they are, and the host waits for none."""
        self._top1_ME = self._top1_ME.to(top1_ME.device).add_(top1_ME)
        self._steps += 1
        if self._steps < self._health.dead_after:
            return []
        seen_ME, self._top1_ME = self._top1_ME.cpu(), torch.zeros_like(self._top1_ME)
        share_M, expert_M = (seen_ME / seen_ME.sum(1, keepdim=True).clamp_min(1)).max(1)
        self._steps = 0
        collapsed = (share_M > self._health.collapse_share).nonzero().flatten().tolist()
        if not collapsed:
            return []
        named = [
            f"{self._routers[m]} ({self._experts[int(expert_M[m])]} {share_M[m]:.0%})" for m in collapsed
        ]
        return self._bounded(
            "collapse",
            f"routing has collapsed over the last {self._health.dead_after} steps: nearly all first choices "
            f"go to one expert in {_listed(named)}",
        )

    def _bounded(self, kind: str, text: str) -> list[str]:
        self._told[kind] = self._told.get(kind, 0) + 1
        if self._told[kind] > MOST_WARNINGS:
            return []
        return [text + ("; this is not told again" if self._told[kind] == MOST_WARNINGS else "")]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
