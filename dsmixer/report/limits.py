"""Which rows and columns a plot shows where there are more than a reader can tell apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsmixer.config.outline import MAX_SHOWN, evenly

__all__ = ["MAX_SHOWN", "MAX_WRITTEN", "evenly", "largest", "shown", "with_remarks"]

MAX_WRITTEN = 16  # columns up to which the cells of a heat map carry their numbers


def largest(weights: Sequence[float] | np.ndarray, limit: int = MAX_SHOWN) -> list[int]:
    """Positions of the ``limit`` largest weights, in their own order; the first of equal ones."""
    values = np.nan_to_num(np.asarray(weights, dtype=float), nan=-np.inf)
    return sorted(int(index) for index in np.argsort(-values, kind="stable")[:limit])


def shown(kind: str, how: str, number: int, total: int) -> str:
    """A remark such as ``64 largest of 196 experts``; empty where all are shown."""
    return "" if number == total else f"{number} {how} of {total} {kind}"


def with_remarks(title: str, *remarks: str) -> str:
    """The title, and in a second line what it leaves out."""
    said = ", ".join(remark for remark in remarks if remark)
    return f"{title}\n{said}" if said else title
