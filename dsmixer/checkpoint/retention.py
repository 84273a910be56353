"""Which checkpoints of a stage stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """What is kept of a stage's checkpoints; one that any of the three keeps stays.

    Attributes:
        keep: the newest so many.
        every: those whose step is a multiple of it; None: no others.
        best: the one of the least loss.
    """

    keep: int
    every: int | None = None
    best: bool = False


def no_longer_kept(loss_of: Mapping[int, float | None], retention: Retention) -> list[int]:
    """The steps whose checkpoints may go, ascending.

    Args:
        loss_of: the loss of each checkpoint by its step; None where it is not known, which is never the best.
        retention: what is kept. Of two equal losses the later one is the best.
    """
    steps = sorted(loss_of)
    kept = set(steps[-retention.keep :])
    if retention.every is not None:
        kept |= {step for step in steps if step % retention.every == 0}
    known = {step: loss for step, loss in loss_of.items() if loss is not None and math.isfinite(loss)}
    if retention.best and known:
        kept.add(min(known, key=lambda step: (known[step], -step)))
    return [step for step in steps if step not in kept]
