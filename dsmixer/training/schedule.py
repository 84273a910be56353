"""The learning rate of a step."""

from __future__ import annotations

import math


def rate_share(step: int, num_steps: int, warmup_ratio: float, scheduler: str) -> float:
    """Share of the peak rate at ``step`` (from 0): linear warm-up, then cosine, linear or constant.

    The first of n warm-up steps runs at 1/n of the peak; the fall reaches zero after the last step.

    Args:
        step: optimizer step from 0.
        num_steps: of the stage.
        warmup_ratio: share of the steps that warm up, rounded up.
        scheduler: ``cosine``, ``linear`` or ``constant``.
    """
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if scheduler == "constant":
        return 1.0
    done = (step - warmup) / max(1, num_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * done)) if scheduler == "cosine" else 1.0 - done
