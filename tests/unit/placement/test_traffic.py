"""Bytes on the wire against brute-force counts, closed forms and the design's crossover."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from unit.placement.llama3 import STAGE1, STAGE2, layout, request

from dsmixer.placement.copies import copies_of
from dsmixer.placement.memory import Layout
from dsmixer.placement.owners import Owners, owners_of, pack_slots
from dsmixer.placement.request import Cluster, EngineSizes
from dsmixer.placement.traffic import (
    dispatch_width,
    first_width,
    pairs_exchange,
    shared_gradients,
    step_seconds,
    step_traffic,
    tokens_exchange,
    weights_exchange,
)

FULL = replace(STAGE2, rows=4, max_length=1024, accumulation=1)
KEEPS_NOTHING = EngineSizes(persistence=0, max_reuse=0)


def test_tokens_against_a_count_of_every_copy() -> None:
    """Tokens with K of eight experts, one copy a token and rank, out and back, both passes."""
    ep, top_k, tokens, draw = 4, 3, 20_000, random.Random(1)
    plan = request(8, ep, checkpointing=False)
    owners = owners_of(pack_slots([1.0] * 8, ep), ep)
    owner = [owners.of(e)[0] for e in range(8)]
    copies = sum(
        len({owner[e] for e in draw.sample(range(8), top_k)} - {home})
        for home in (draw.randrange(ep) for _ in range(tokens))
    )
    widths = sum(p.in_features + p.out_features for p in plan.model.projections)
    counted = copies * (2 * widths - 3 * 4096) * plan.base_bytes
    planned = tokens_exchange(plan, tokens, copies_of(owners, top_k).most_moved)
    assert planned == pytest.approx(counted, rel=0.01)


def test_a_layer_that_is_run_again_sends_its_tokens_again() -> None:
    """And the first block's input has a gradient then."""
    again, once = request(64, 8), request(64, 8, checkpointing=False)
    width = 32 * 26_624
    assert tokens_exchange(again, 1024, 2.0) == 1024 * 2 * 3 * width * 2
    assert tokens_exchange(once, 1024, 2.0) == 1024 * 2 * (2 * width - 3 * 4096) * 2
    block = request(64, 8, checkpointing=False, router="per_block")
    assert (first_width(again), first_width(once), first_width(block)) == (0, 3 * 4096, 4096)
    # K weights and K indices in float32 out, their gradients back; counts of copies for seven others
    assert pairs_exchange(once, 1024, 2.0, 3, 8) == 128 * (2 * 1024 * 2 * 2 * 3 * 4 + 8 * 7)
    assert pairs_exchange(again, 1024, 2.0, 3, 8) == 128 * (3 * 1024 * 2 * 2 * 3 * 4 + 2 * 8 * 7)


def test_weights_against_a_count_of_every_shard() -> None:
    """A ring sends each rank's shard W − 1 times in a gather, and as much in a reduce-scatter."""
    plan, world = request(6, 4), 4
    sent = 0
    for p in plan.model.projections:
        for width in (p.in_features, p.out_features):
            shard = 6 * 64 * width // world
            sent += 3 * (world - 1) * shard * 4
    assert weights_exchange(plan) == sent


def test_llama3_crosses_from_weights_to_tokens_at_about_64_experts() -> None:
    """The design: n = 4096, K = 3, large EP, float32 weights, bf16 tokens, no layer run again."""
    world = 1024
    meet = next(
        e
        for e in range(1, 200)
        if weights_exchange(request(e, world))
        > tokens_exchange(request(e, world, checkpointing=False), 4096, 3)
    )
    assert 60 <= meet <= 68
    closed = 2 * 4096 * 3 * 2 / (3 * 64 * 4)
    assert closed == 64


def test_a_dispatch_that_serves_q_k_and_v_counts_their_input_once() -> None:
    alone, shared = request(6, 4), request(6, 4, router="per_block")
    width = 32 * (4 * 4096 + 4096 + 1024 + 1024 + 4096)
    assert dispatch_width(alone) == width
    assert width - dispatch_width(shared) == 32 * 2 * 4096


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_stage_one_sends_no_tokens(router: str, zero_stage: int) -> None:
    sent = step_traffic(request(64, 8, router=router), layout("tokens", zero_stage, 8, 64), STAGE1)
    assert sent.exchanged == 0.0
    two = step_traffic(request(64, 8, router=router), layout("tokens", zero_stage, 8, 64), STAGE2)
    assert two.tokens > two.pairs > 0.0
    # where every expert has one owner and every rank experts of its own, nothing else is sent either
    assert (sent.total == 0.0) == (zero_stage < 3)


def test_groups_of_ranks_that_hold_the_same_experts_reduce_their_gradients() -> None:
    """Two groups of four: 3 (N − 1)/N of 16 · 64 · 851,968 weights."""
    pairs = step_traffic(request(64, 8), layout("tokens", 1, 4, 64), STAGE1)
    assert pairs.gradients == pairs.total == 3 * 4 * 16 * 64 * 851_968 / 2


def test_experts_with_several_owners_add_up_their_gradients_over_all_ranks_that_hold_them() -> None:
    """Expert 0 on three of four ranks, expert 1 on two; twice, in two groups."""
    parts = (((0, 0.5), (1, 0.25), (2, 0.25)), ((2, 0.5), (3, 0.5)), ((3, 1.0),))
    spread = Layout("tokens", 1, Owners(parts, (1.0,) * 4))
    one = 2 * 4 * 64 * 851_968
    assert spread.shared_with(8) == ((6,), (6,), (6, 4), (4,))
    assert shared_gradients(request(3, 8), spread) == pytest.approx(one * (5 / 6 + 3 / 4))
    once = step_traffic(request(3, 8), spread, STAGE1)
    assert once.gradients == pytest.approx(one * (5 / 6 + 3 / 4) + 3 * 4 * 2 * 64 * 851_968 / 2)
    frozen = replace(STAGE2, trains_experts=False, keeps_origin=False)
    routers = 3 * 4 * 3 * 32 * 4 * 4096 * 7 / 8
    assert step_traffic(request(3, 8), spread, frozen).gradients == pytest.approx(routers)
    zero3 = step_traffic(request(3, 8), replace(spread, zero_stage=3), STAGE1)
    assert zero3.gradients == pytest.approx(one * (5 / 6 + 3 / 4))


@pytest.mark.parametrize(("zero_stage", "times"), [(0, 2), (1, 3), (2, 9)])
def test_replicated_gradients_by_hand(zero_stage: int, times: int) -> None:
    """All-reduce: 2 (W − 1)/W; ZeRO-2 in each of four micro-batches; ZeRO 1 and 2 gather the weights."""
    sent = step_traffic(request(6, 4), layout("replicate", zero_stage, 1, 6), STAGE1)
    assert sent.total == sent.gradients == times * 4 * 327_155_712 * 3 / 4


def test_zero3_gathers_base_and_experts_in_every_micro_batch() -> None:
    """The embedding in the forward pass alone."""
    plan = request(6, 4, engine=KEEPS_NOTHING, checkpointing=False)
    sent = step_traffic(plan, layout("weights", 3, 1, 6), STAGE1)
    assert sent.base == 4 * 2 * (2 * 8_030_261_248 - 128_256 * 4096) * 3 / 4
    assert sent.weights == 4 * weights_exchange(plan)
    frozen = replace(STAGE2, trains_experts=False, trains_routers=False)
    still = step_traffic(plan, layout("weights", 3, 1, 6), frozen)
    assert still.weights == pytest.approx(4 * 2 * 4 * (327_155_712 + 3_145_728) * 3 / 4)


def test_zero3_gathers_less_where_it_keeps_weights_and_more_where_layers_are_run_again() -> None:
    whole = layout("weights", 3, 1, 6)
    plain = request(6, 4, engine=KEEPS_NOTHING, checkpointing=False)
    everything = replace(plain, engine=EngineSizes(persistence=0, max_reuse=10**12))
    assert step_traffic(everything, whole, STAGE1).weights == 4 * weights_exchange(plain) * 2 / 3
    assert step_traffic(everything, whole, STAGE2).weights > 4 * weights_exchange(plain)
    again = replace(plain, checkpointing=True)
    assert step_traffic(again, whole, STAGE1).weights == 4 * weights_exchange(plain) * 4 / 3
    # routers of 24,576 weights stay gathered, and are made new once a step
    persistent = replace(plain, engine=EngineSizes(persistence=100_000, max_reuse=0))
    more = step_traffic(persistent, whole, STAGE1).weights - 4 * weights_exchange(plain)
    assert more == 4 * 3_145_728 * 3 / 4


def test_one_rank_sends_nothing() -> None:
    for zero in range(4):
        whole = layout("weights" if zero == 3 else "replicate", zero, 1, 6)
        assert step_traffic(request(6, 1), whole, STAGE2).total == 0


def test_tokens_inside_a_node_take_the_fast_links() -> None:
    plan, near, far = request(64, 16), layout("tokens", 1, 8, 64), layout("tokens", 1, 16, 64)
    cluster = Cluster(16, 8, link_speed=1e9, node_link_speed=1e8)
    for spread, speed in ((near, 1e9), (far, 1e8)):
        sent = step_traffic(plan, spread, STAGE2)
        want = sent.exchanged / speed + (sent.total - sent.exchanged) / 1e8
        assert step_seconds(sent, spread, cluster) == pytest.approx(want)
