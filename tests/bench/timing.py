"""Times that compare on a machine with other work: turns in rounds, medians, ratios within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``number`` values; of a single one, three times itself."""

    median: float
    low: float
    high: float
    number: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


def ratios(own: Sequence[float], other: Sequence[float]) -> Spread:
    """Of what was measured in the same round, one by the other."""
    return spread([mine / theirs for mine, theirs in zip(own, other, strict=True)])


def clock(threads: int) -> float:
    """Seconds; of a single thread its own, which others on the machine do not lengthen much."""
    return time.thread_time() if threads == 1 else time.perf_counter()


def seconds(work: Callable[[], object], threads: int, finish: Callable[[], None] | None = None) -> float:
    """What ``work`` takes.

    Args:
        work: what is measured.
        threads: that it runs on; on a GPU 0.
        finish: waits for what ``work`` has only begun.
    """
    began = clock(threads)
    work()
    if finish is not None:
        finish()
    return clock(threads) - began


def turn_of(work: Callable[[], object], threads: int) -> Callable[[], list[float]]:
    """Doing ``work`` once, as a turn of ``in_rounds``."""
    return lambda: [seconds(work, threads)]


def in_rounds(turns: Mapping[str, Callable[[], Sequence[float]]], rounds: int) -> dict[str, list[float]]:
    """Everyone has a turn in every round, in the other direction every second time.

    Args:
        turns: what each does in its turn; the times of its parts, whose median counts for the round.
        rounds: how many.

    Returns:
        one time a round, by name.
    """
    found: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        order = list(turns) if number % 2 == 0 else list(reversed(turns))
        for name in order:
            found[name].append(statistics.median(turns[name]()))
    return found
