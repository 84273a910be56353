"""Owners of experts against brute force, by hand, and by properties."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmixer.placement.owners import assign_owners

POOLS = st.lists(st.integers(0, 1000), min_size=1, max_size=24)


def best_makespan(tokens: list[int], num_ranks: int) -> int:
    """The busiest rank of the best of all assignments of whole experts."""
    best = sum(tokens)
    for owners in itertools.product(range(num_ranks), repeat=len(tokens)):
        loads = [0] * num_ranks
        for size, rank in zip(tokens, owners, strict=True):
            loads[rank] += size
        best = min(best, max(loads))
    return best


@given(POOLS, st.integers(1, 9))
def test_every_expert_has_an_owner_and_all_its_tokens_are_dealt_out(
    tokens: list[int], num_ranks: int
) -> None:
    owners = assign_owners(tokens, num_ranks)
    loads = [0.0] * num_ranks
    for size, parts in zip(tokens, owners.parts, strict=True):
        assert parts and len({rank for rank, _ in parts}) == len(parts)
        assert all(0 <= rank < num_ranks and share > 0 for rank, share in parts)
        assert sum(share for _, share in parts) == pytest.approx(1.0)
        for rank, share in parts:
            loads[rank] += share * size
    assert owners.loads == pytest.approx(loads, abs=1e-6)
    assert sum(loads) == pytest.approx(sum(tokens))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_the_busiest_rank_is_within_four_thirds_of_the_optimum(tokens: list[int], num_ranks: int) -> None:
    """Graham's bound; an optimum that may not split is no better than one that may."""
    assert max(assign_owners(tokens, num_ranks).loads) <= best_makespan(tokens, num_ranks) * 4 / 3 + 1e-6


@given(POOLS, st.integers(1, 9))
def test_no_rank_is_further_above_the_mean_than_one_whole_expert(tokens: list[int], num_ranks: int) -> None:
    """Of those that are not split: a list schedule adds each to a rank at or below the mean."""
    share = sum(tokens) / num_ranks
    largest = max((size for size in tokens if size <= share * (1 + 1e-9)), default=0)
    rest = max((size % share if share else 0 for size in tokens), default=0)
    assert max(assign_owners(tokens, num_ranks).loads) <= share + max(largest, rest) + 1e-6


@given(POOLS, st.integers(1, 9))
def test_only_an_expert_above_a_ranks_share_has_several_owners(tokens: list[int], num_ranks: int) -> None:
    owners, share = assign_owners(tokens, num_ranks), sum(tokens) / num_ranks
    for expert, size in enumerate(tokens):
        assert len(owners.of(expert)) == 1 or size > share


def test_longest_first_by_hand() -> None:
    """7, 6, 5, 4, 3 on two ranks: 7 | 6, then 5 to the 6, 4 to the 7, 3 to the one at 11 that came first."""
    owners = assign_owners([3, 5, 7, 6, 4], 2)
    assert [owners.of(e) for e in range(5)] == [(0,), (1,), (0,), (1,), (0,)]
    assert owners.loads == (14, 11)


def test_a_domain_with_sixty_percent_of_the_tokens_keeps_the_busiest_rank_within_ten_percent() -> None:
    owners = assign_owners([60, 8, 8, 8, 8, 8], 4)
    assert len(owners.of(0)) == 3
    assert owners.imbalance <= 1.10
    alone = [60 + 8, 8 + 8, 8, 8]  # one owner each, as evenly as they go
    assert max(alone) / 23 > 2.5


def test_more_ranks_than_experts_and_a_number_that_does_not_divide() -> None:
    three = assign_owners([30, 30, 30], 8)
    assert [len(three.of(e)) for e in range(3)] == [3, 3, 3]
    assert three.imbalance < 1.07  # two of them share a rank: five ranks for 60 of 90 tokens
    five = assign_owners([1] * 5, 2)
    assert sorted(len(five.held(rank)) for rank in range(2)) == [2, 3]
    assert five.most_held() == 3


def test_experts_without_tokens_are_spread_by_number() -> None:
    owners = assign_owners([0] * 12, 4)
    assert [len(owners.held(rank)) for rank in range(4)] == [3, 3, 3, 3]
    assert owners.imbalance == 1.0


def test_a_thousand_even_experts_fall_evenly_on_four_ranks() -> None:
    owners = assign_owners([17] * 1024, 4)
    assert [len(owners.held(rank)) for rank in range(4)] == [256] * 4
