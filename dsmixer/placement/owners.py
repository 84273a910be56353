"""Who owns which expert: the pool laid out on one line and cut into equal slots, and ranks that own slots.

Slots follow from the training data alone, so that the rows of a step, drawn equally from every slot, are
the same on any number of ranks. A rank owns the slots in its part of the line, and so each expert in them.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

TOLERANCE = 0.04
"""A cut moves to the border of an expert that lies within this share of a slot, so that fewer are cut."""

ROUNDING = 1e-9

Part = tuple[int, float, float]
"""An expert, and from which to which share of its training data."""


@dataclass(frozen=True)
class Slots:
    """Experts' training data in parts of about the same load.

    Attributes:
        parts: of each slot, in the order of the line; those of one expert follow each other and make up its
            data from 0 to 1.
        loads: of each expert, in any unit.
    """

    parts: tuple[tuple[Part, ...], ...]
    loads: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def num_experts(self) -> int:
        return len(self.loads)


@dataclass(frozen=True)
class Owners:
    """Experts on the EP ranks of one expert-parallel group.

    Attributes:
        parts: for each expert, its owners with the share of its data that each takes; the shares sum to 1.
        loads: of each EP rank, in the unit of the slots' loads.
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
        return max(len(self.held(rank)) for rank in range(len(self.loads)))

    def several(self) -> tuple[int, ...]:
        """The experts with more than one owner."""
        return tuple(e for e, parts in enumerate(self.parts) if len(parts) > 1)

    def load_over_mean(self, rank: int) -> float:
        """Load of a rank over the mean of all; 1 is even."""
        total = sum(self.loads)
        return self.loads[rank] * len(self.loads) / total if total else 1.0

    @property
    def imbalance(self) -> float:
        """Load of the busiest rank over the mean."""
        return max(map(self.load_over_mean, range(len(self.loads))))


def pack_slots(loads: Sequence[float], num_slots: int) -> Slots:
    """Cut a pool into slots of equal load.

    The line is divided again and again, each time longest expert first to the part with the least load so far
    (Graham 1969), so that every stretch of it holds large and small ones. It is cut at equal distances; a cut
    moves up to 4 % of a slot to spare an expert. So a slot is within 8 % of the mean, whatever the loads, and
    only an expert that lies across a cut is in more than one.

    Args:
        loads: training tokens, or rows, of each expert; 0 or more. Where all are 0 they count alike.
        num_slots: S.
    """
    loads = tuple(map(float, loads)) if any(loads) else (1.0,) * len(loads)
    order = _line(list(range(len(loads))), loads, num_slots)
    ends = list(accumulate(loads[expert] for expert in order))
    cuts = _cuts(ends, num_slots)
    parts: list[list[Part]] = [[] for _ in range(num_slots)]
    for expert, end in zip(order, ends, strict=True):
        load = loads[expert]
        begin = end - load
        slot = min(max(0, bisect_left(cuts, begin + ROUNDING * ends[-1]) - 1), num_slots - 1)
        done = 0.0
        while done < 1.0:
            stop = 1.0
            if load and slot + 1 < num_slots and cuts[slot + 1] < end - ROUNDING * ends[-1]:
                stop = (cuts[slot + 1] - begin) / load
            parts[slot].append((expert, done, stop))
            done, slot = stop, slot + 1
    return Slots(tuple(map(tuple, parts)), loads)


def owners_of(slots: Slots, num_ranks: int) -> Owners:
    """Ranks own equal stretches of the line of slots; a slot that lies in two of them has two owners.

    Args:
        slots: of the pool.
        num_ranks: EP.
    """
    owned: list[dict[int, float]] = [{} for _ in slots.loads]
    loads = [0.0] * num_ranks
    for slot, parts in enumerate(slots.parts):
        for rank, share in _stretches(slot, len(slots), num_ranks):
            for expert, start, stop in parts:
                owned[expert][rank] = owned[expert].get(rank, 0.0) + (stop - start) * share
                loads[rank] += slots.loads[expert] * (stop - start) * share
    return Owners(tuple(tuple(sorted(own.items())) for own in owned), tuple(loads))


def _stretches(slot: int, num_slots: int, num_ranks: int) -> list[tuple[int, float]]:
    """The ranks on whose stretch a slot lies, with the share of the slot, in whole numbers until the end."""
    begin, end = slot * num_ranks, (slot + 1) * num_ranks  # in units of 1 / (slots x ranks)
    found = []
    for rank in range(begin // num_slots, -(-end // num_slots)):
        inside = min(end, (rank + 1) * num_slots) - max(begin, rank * num_slots)
        found.append((rank, inside / num_ranks))
    return found


def _line(experts: list[int], loads: Sequence[float], num_slots: int) -> list[int]:
    if num_slots == 1 or len(experts) < 2:
        return experts
    divisor = next(d for d in range(2, num_slots + 1) if num_slots % d == 0)
    groups = _longest_first(experts, loads, divisor)
    return [expert for group in groups for expert in _line(group, loads, num_slots // divisor)]


def _longest_first(experts: list[int], loads: Sequence[float], num_groups: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    loaded = [expert for expert in experts if loads[expert] > 0]
    heap = [(0.0, 0, group) for group in range(num_groups)]  # load, experts, group
    for expert in sorted(loaded, key=lambda e: (-loads[e], e)):
        load, held, group = heapq.heappop(heap)
        groups[group].append(expert)
        heapq.heappush(heap, (load + loads[expert], held + 1, group))
    counts = [(len(members), group) for group, members in enumerate(groups)]
    heapq.heapify(counts)
    # those without data weigh nothing but memory, and stand before the others, at the begin of their slot
    for expert in (e for e in experts if loads[e] == 0):
        held, group = heapq.heappop(counts)
        groups[group].insert(0, expert)
        heapq.heappush(counts, (held + 1, group))
    return groups


def _cuts(ends: list[float], num_slots: int) -> list[float]:
    """Begin of each slot on the line."""
    share = ends[-1] / num_slots
    cuts = [0.0]
    for slot in range(1, num_slots):
        cut = slot * share
        at = bisect_left(ends, cut)
        near = min(ends[max(0, at - 1) : at + 1], key=lambda end: abs(end - cut))
        cuts.append(near if abs(near - cut) <= TOLERANCE * share else cut)
    return cuts
