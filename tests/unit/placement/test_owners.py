"""Slots and owners by hand and by properties."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmixer.placement.owners import Slots, owners_of, pack_slots

POOLS = st.lists(st.integers(0, 1000), min_size=1, max_size=24)
SLOTS = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 30])


def loads_of(slots: Slots) -> list[float]:
    return [sum(slots.loads[e] * (stop - start) for e, start, stop in parts) for parts in slots.parts]


@given(POOLS, SLOTS)
def test_slots_hold_every_expert_from_begin_to_end_in_the_order_of_the_line(
    loads: list[int], num_slots: int
) -> None:
    slots = pack_slots(loads, num_slots)
    done: dict[int, float] = {}
    last: dict[int, int] = {}
    for slot, parts in enumerate(slots.parts):
        for expert, start, stop in parts:
            assert start == done.get(expert, 0.0) < stop
            assert last.get(expert, slot - 1) == slot - 1, "the slots of an expert follow each other"
            done[expert], last[expert] = stop, slot
    assert done == dict.fromkeys(range(len(loads)), 1.0)


@given(POOLS, SLOTS)
def test_every_slot_is_within_eight_percent_of_the_mean_whatever_the_loads(
    loads: list[int], num_slots: int
) -> None:
    slots = pack_slots(loads, num_slots)
    mean = sum(slots.loads) / num_slots
    assert len(slots) == num_slots
    assert all(abs(load - mean) <= 0.0801 * mean for load in loads_of(slots))


@given(POOLS, SLOTS, st.integers(1, 9))
def test_owners_take_all_of_each_expert_and_even_loads(
    loads: list[int], num_slots: int, num_ranks: int
) -> None:
    slots = pack_slots(loads, num_slots)
    owners = owners_of(slots, num_ranks)
    taken = [0.0] * num_ranks
    for load, parts in zip(slots.loads, owners.parts, strict=True):
        assert sum(share for _, share in parts) == pytest.approx(1.0)
        ranks = [rank for rank, _ in parts]
        assert ranks == list(range(ranks[0], ranks[-1] + 1)), "owners of an expert are neighbours"
        for rank, share in parts:
            taken[rank] += share * load
    assert owners.loads == pytest.approx(taken)
    assert owners.imbalance <= 1.0801 and all(owners.held(rank) for rank in range(num_ranks))


@given(POOLS, st.sampled_from([4, 8, 12, 24]), st.sampled_from([(1, 2), (2, 4), (1, 4)]))
def test_a_rank_of_few_owns_what_its_ranks_of_many_own(
    loads: list[int], num_slots: int, sizes: tuple[int, int]
) -> None:
    slots = pack_slots(loads, num_slots)
    few, many = (owners_of(slots, size) for size in sizes)
    fold = sizes[1] // sizes[0]
    for rank in range(sizes[0]):
        inside = {e for part in range(fold) for e in many.held(rank * fold + part)}
        assert inside == set(few.held(rank))


def test_equal_experts_that_divide_have_one_owner_each() -> None:
    owners = owners_of(pack_slots([17] * 1024, 16), 4)
    assert [len(owners.held(rank)) for rank in range(4)] == [256] * 4
    assert owners.several() == () and owners.imbalance == 1.0


def test_by_hand() -> None:
    """Loads 4, 2, 1, 1 in two slots: {4}, then {2, 1, 1}; in four the first fills two."""
    assert pack_slots([1, 4, 2, 1], 2).parts == (
        ((1, 0.0, 1.0),),
        ((2, 0.0, 1.0), (0, 0.0, 1.0), (3, 0.0, 1.0)),
    )
    four = pack_slots([1, 4, 2, 1], 4)
    assert four.parts[:2] == (((1, 0.0, 0.5),), ((1, 0.5, 1.0),))
    assert owners_of(four, 2).parts == (((1, 1.0),), ((0, 1.0),), ((1, 1.0),), ((1, 1.0),))
    assert owners_of(four, 4).of(1) == (0, 1) and owners_of(four, 4).several() == (1,)


def test_a_domain_with_sixty_percent_of_the_load_keeps_the_busiest_rank_within_ten_percent() -> None:
    owners = owners_of(pack_slots([60, 8, 8, 8, 8, 8], 16), 4)
    assert len(owners.of(0)) == 3 and owners.imbalance <= 1.10
    alone = [60, 8 + 8, 8 + 8, 8]  # one owner each, as evenly as they go
    assert max(alone) / 25 == 2.4


def test_more_ranks_than_experts_and_a_number_that_does_not_divide() -> None:
    three = owners_of(pack_slots([30, 30, 30], 8), 8)
    assert sorted(len(three.of(e)) for e in range(3)) == [3, 3, 4] and three.imbalance == pytest.approx(1.0)
    five = owners_of(pack_slots([1] * 5, 8), 2)
    assert [len(five.held(rank)) for rank in range(2)] == [3, 3] and len(five.several()) == 1


def test_a_border_near_a_cut_spares_an_expert() -> None:
    near, far = owners_of(pack_slots([100, 103], 2), 2), owners_of(pack_slots([100, 120], 2), 2)
    assert near.several() == () and near.imbalance == pytest.approx(103 / 101.5)
    assert len(far.several()) == 1 and far.imbalance == pytest.approx(1.0)


def test_experts_without_data_are_spread_by_number() -> None:
    owners = owners_of(pack_slots([0] * 12, 4), 4)
    assert [len(owners.held(rank)) for rank in range(4)] == [3, 3, 3, 3]
    some = owners_of(pack_slots([10, 10, 10, 10, *[0] * 12], 4), 4)
    assert [len(some.held(rank)) for rank in range(4)] == [4, 4, 4, 4]


def test_large_and_small_experts_are_mixed_on_every_rank() -> None:
    draw = random.Random(0)
    loads = [draw.lognormvariate(0, 1) for _ in range(1024)]
    owners = owners_of(pack_slots(loads, 64), 4)
    held = [len(owners.held(rank)) for rank in range(4)]
    assert max(held) <= 1.05 * 256 and owners.imbalance < 1.01 and len(owners.several()) <= 3
