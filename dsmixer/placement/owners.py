"""Who owns which expert: longest processing time first, by training tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 1e-9
LEVELLING_PASSES = 8


@dataclass(frozen=True)
class Owners:
    """Experts on the EP ranks of one expert-parallel group.

    Attributes:
        parts: for each expert, its owners with the share of its tokens that each takes; the shares sum to 1.
        loads: training tokens of each EP rank.
    """

    parts: tuple[tuple[tuple[int, float], ...], ...]
    loads: tuple[float, ...]

    def of(self, expert: int) -> tuple[int, ...]:
        """The EP ranks that hold an expert."""
        return tuple(rank for rank, _ in self.parts[expert])

    def held(self, rank: int) -> tuple[int, ...]:
        """The experts that an EP rank holds."""
        return tuple(e for e, parts in enumerate(self.parts) if any(r == rank for r, _ in parts))

    def most_held(self) -> int:
        """Experts on the EP rank that holds most."""
        counts = [0] * len(self.loads)
        for parts in self.parts:
            for rank, _ in parts:
                counts[rank] += 1
        return max(counts)

    @property
    def imbalance(self) -> float:
        """Tokens of the busiest rank over the mean; 1 is even."""
        total = sum(self.loads)
        return max(self.loads) * len(self.loads) / total if total else 1.0


def assign_owners(tokens: Sequence[float], num_ranks: int, *, several: bool = True) -> Owners:
    """Give every expert an owner, so that the ranks get about the same training tokens.

    An expert with more tokens than a rank's share (the mean over ranks) fills whole ranks; its rest and all
    other experts go, longest first, to the rank with the least tokens so far, and among those to the one with
    the fewest experts (Graham 1969: without such large experts the busiest rank has at most 4/3 of what the
    best possible assignment gives it). Last, an expert with several owners is dealt out anew among them,
    so that they end level.

    Args:
        tokens: training tokens of each expert, 0 or more.
        num_ranks: EP.
        several: whether a large expert may have several owners; else each has one, and with at least as many
            experts as ranks no rank is left without.
    """
    share = sum(tokens) / num_ranks
    parts: list[dict[int, float]] = [{} for _ in tokens]
    whole, items = 0, []
    for expert, size in enumerate(tokens):
        left = float(size)
        # a share that floating point makes a little too large must not take one rank too many
        while several and left > share * (1 + TOLERANCE) and whole < num_ranks:
            parts[expert][whole] = share
            left -= share
            whole += 1
        if left > share * TOLERANCE or not parts[expert]:
            items.append((left, expert))
    _longest_first(items, parts, whole, share, num_ranks)
    loads = [0.0] * num_ranks
    for own in parts:
        for rank, size in own.items():
            loads[rank] += size
    split = [own for own in parts if len(own) > 1]
    for own in split * LEVELLING_PASSES:  # two of them may share a rank
        _level(own, loads)
    return Owners(tuple(_shares(own) for own in parts), tuple(loads))


def _longest_first(
    items: list[tuple[float, int]], parts: list[dict[int, float]], whole: int, share: float, num_ranks: int
) -> None:
    # (tokens, experts held, rank), least first; the first ranks are full with one large expert each
    heap = [(share, 1, rank) if rank < whole else (0.0, 0, rank) for rank in range(num_ranks)]
    heapq.heapify(heap)
    for size, expert in sorted(items, key=lambda item: (-item[0], item[1])):
        load, held, rank = heapq.heappop(heap)
        parts[expert][rank] = parts[expert].get(rank, 0.0) + size
        heapq.heappush(heap, (load + size, held + 1, rank))


def _level(own: dict[int, float], loads: list[float]) -> None:
    """Deal one expert's tokens out anew among its owners, the least loaded first, in place."""
    total = sum(own.values())
    below = sorted((loads[rank] - size, rank) for rank, size in own.items())
    filled, count = 0.0, 0
    for load, _ in below:
        if count and load * count - filled >= total:
            break
        filled, count = filled + load, count + 1
    level = (total + filled) / count
    for load, rank in below:
        own[rank] = max(0.0, level - load)
        loads[rank] = load + own[rank]


def _shares(own: dict[int, float]) -> tuple[tuple[int, float], ...]:
    total = sum(own.values())
    if total == 0:
        return tuple((rank, 1.0 / len(own)) for rank in sorted(own))
    kept = [(rank, size) for rank, size in sorted(own.items()) if size > 0]
    return tuple((rank, size / total) for rank, size in kept)
