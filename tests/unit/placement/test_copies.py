"""Copies of a token against every draw of its experts, by the exchange's own rule, and closed forms."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmixer.placement.copies import copies_of, named_share
from dsmixer.placement.layout import ExpertLayout
from dsmixer.placement.owners import Owners, owners_of, pack_slots

LOADS = [
    [1, 1, 1, 1, 1, 1, 1, 1],
    [8, 1, 1, 1, 1, 1],
    [400, 60, 30, 70, 40, 12],
    [5, 4, 3, 2, 1],
]


def even(num_experts: int, ep: int) -> Owners:
    return owners_of(pack_slots((1.0,) * num_experts, ep), ep)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("ep", [2, 3, 4])
@pytest.mark.parametrize("loads", LOADS)
def test_copies_are_the_mean_over_all_draws_by_the_rule_of_the_exchange(
    loads: list[float], ep: int, top_k: int
) -> None:
    owners = owners_of(pack_slots(loads, ep), ep)
    found = copies_of(owners, top_k)
    owned = tuple(owners.held(rank) for rank in range(ep))
    draws = list(itertools.combinations(range(len(loads)), top_k))
    sent, received, kept = [0] * ep, [0] * ep, [0] * ep
    for rank in range(ep):
        destination, _ = ExpertLayout(owned, rank).destination_and_place()
        for draw in draws:
            for other in {destination[expert] for expert in draw}:
                if other == rank:
                    kept[rank] += 1
                else:
                    sent[rank] += 1
                    received[other] += 1
    for got, want in ((found.sent, sent), (found.received, received), (found.kept, kept)):
        assert got == pytest.approx([count / len(draws) for count in want], abs=1e-12)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_what_is_sent_is_received_and_no_token_goes_to_more_ranks_than_it_has_experts(
    num_experts: int, ep: int, top_k: int
) -> None:
    ep, top_k = min(ep, num_experts), min(top_k, num_experts)
    found = copies_of(even(num_experts, ep), top_k)
    assert sum(found.sent) == pytest.approx(sum(found.received))
    for rank in range(ep):
        assert -1e-9 <= found.sent[rank] <= min(ep - 1, top_k) + 1e-9
        assert found.sent[rank] + found.kept[rank] >= 1 - 1e-9


def test_in_a_large_pool_it_is_the_design_s_formula() -> None:
    """EP · (1 − (1 − 1/EP)^K) destinations, of which (EP − 1)/EP are other ranks."""
    for ep, top_k in ((8, 3), (64, 3), (4, 2)):
        closed = ep * (1 - (1 - 1 / ep) ** top_k) * (ep - 1) / ep
        assert copies_of(even(4096, ep), top_k).most_moved == pytest.approx(closed, rel=2e-3)


def test_by_hand() -> None:
    """64 experts on eight ranks, K = 3: seven times 1 − 56 · 55 · 54 / (64 · 63 · 62)."""
    assert named_share(64, 8, 3) == pytest.approx(1 - 166_320 / 249_984)
    assert copies_of(even(64, 8), 3).most_moved == pytest.approx(7 * (1 - 166_320 / 249_984))
    assert copies_of(even(8, 4), 8).sent == (3.0,) * 4, "where every expert answers, every rank is asked"


def test_several_owners_lower_the_copies() -> None:
    """Of four experts on four ranks the first lies on all of them."""
    one = Owners(tuple(((rank, 1.0),) for rank in range(4)), (1.0,) * 4)
    first = tuple((rank, 0.25) for rank in range(4))
    several = Owners((first, *one.parts[1:]), (1.0,) * 4)
    assert copies_of(several, 1).most_moved < copies_of(one, 1).most_moved
    assert copies_of(several, 1).sent == (0.75, 0.5, 0.5, 0.5)
    assert copies_of(several, 1).kept[0] == 0.25 and copies_of(several, 1).kept[1] == 0.5
