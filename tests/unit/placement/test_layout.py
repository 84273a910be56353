"""Experts over the ranks of a group, where some have several owners."""

from __future__ import annotations

import pytest

from dsmixer.placement.layout import ExpertLayout, everything_here

OWNED = ((0, 3), (3, 1), (3, 2, 4))


def test_each_expert_is_counted_by_its_first_owner_alone() -> None:
    layouts = [ExpertLayout(OWNED, rank) for rank in range(3)]
    assert [layout.counted for layout in layouts] == [(True, True), (False, True), (False, True, True)]
    counted = [e for layout in layouts for e, c in zip(layout.local, layout.counted, strict=True) if c]
    assert sorted(counted) == list(range(5)) == list(range(layouts[0].num_experts))
    assert layouts[0].several == (3,) and layouts[0].owners[3] == (0, 1, 2)


def test_tokens_stay_where_their_expert_is_and_other_ranks_share_its_owners() -> None:
    owned = ((0, 4), (1, 4), (2,), (3,))
    sent = [ExpertLayout(owned, rank).destination_and_place() for rank in range(4)]
    assert [ranks[4] for ranks, _ in sent] == [0, 1, 0, 1]
    for ranks, places in sent:
        assert ranks[:4] == [0, 1, 2, 3]
        assert [owned[rank][place] for rank, place in zip(ranks, places, strict=True)] == list(range(5))


def test_a_pool_with_a_hole_or_a_rank_without_experts_is_ours_to_answer_for() -> None:
    for owned in (((0, 2),), ((0, 1), ()), ((0, 0), (1,))):
        with pytest.raises(AssertionError):
            ExpertLayout(owned)
    assert everything_here(3).owned == ((0, 1, 2),) and everything_here(3).several == ()
