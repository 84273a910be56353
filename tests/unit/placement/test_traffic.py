"""Bytes on the wire against brute-force counts, closed forms and the design's crossover."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.placement.llama3 import STAGE1, STAGE2, request

from dsmixer.placement.memory import Layout
from dsmixer.placement.owners import assign_owners
from dsmixer.placement.request import Cluster, destinations
from dsmixer.placement.traffic import (
    dispatch_width,
    step_seconds,
    step_traffic,
    tokens_exchange,
    weights_exchange,
)

FULL = replace(STAGE2, rows=4, max_length=1024, accumulation=1)


@pytest.mark.parametrize(("ranks", "top_k"), [(2, 1), (2, 3), (3, 2), (4, 3)])
def test_destinations_is_the_mean_over_all_draws_of_k_owners(ranks: int, top_k: int) -> None:
    draws = list(itertools.product(range(ranks), repeat=top_k))
    assert destinations(ranks, top_k) == pytest.approx(sum(len(set(draw)) for draw in draws) / len(draws))


@given(st.integers(1, 512), st.integers(1, 8))
def test_destinations_lies_between_one_and_k_and_no_more_than_ep(ranks: int, top_k: int) -> None:
    assert 1 - 1e-9 <= destinations(ranks, top_k) <= min(ranks, top_k) + 1e-9


def test_tokens_against_a_count_of_every_copy() -> None:
    """Tokens with K experts drawn with repetition, one copy a token and rank, out and back, both passes."""
    ep, top_k, tokens, draw = 4, 3, 20_000, random.Random(1)
    plan = request(8, ep)
    owner = [assign_owners([1.0] * 8, ep).of(e)[0] for e in range(8)]
    copies = sum(
        len({owner[draw.randrange(8)] for _ in range(top_k)} - {home})
        for home in (draw.randrange(ep) for _ in range(tokens))
    )
    widths = sum(p.in_features + p.out_features for p in plan.model.projections)
    counted = 2 * copies * widths * plan.base_bytes
    stage = replace(STAGE2, max_length=tokens, top_k=top_k)
    assert tokens_exchange(plan, stage, ep) == pytest.approx(counted, rel=0.01)


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
    """The design: n = 4096, K = 3, large EP, float32 weights, bf16 tokens."""
    world = 1024
    meet = next(
        e
        for e in range(1, 200)
        if weights_exchange(request(e, world)) > tokens_exchange(request(e, world), FULL, world)
    )
    assert 60 <= meet <= 68
    closed = 2 * 4096 * 3 * 2 / (3 * 64 * 4)
    assert closed == 64


def test_a_dispatch_that_serves_q_k_and_v_counts_their_input_once() -> None:
    alone, shared = request(6, 4), request(6, 4, router="per_block")
    width = 32 * (4 * 4096 + 4096 + 1024 + 1024 + 4096)
    assert dispatch_width(alone, STAGE2) == width
    assert width - dispatch_width(shared, STAGE2) == 32 * 2 * 4096
    # stage one asks no router, so that there is none to share
    assert dispatch_width(alone, STAGE1) == dispatch_width(shared, STAGE1) == width


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
def test_stage_one_sends_each_token_to_one_expert_out_and_back_in_both_passes(router: str) -> None:
    """Four micro-batches of 1,024 tokens in bf16, seven of eight to another rank, where EP 8 trains alone."""
    sent = step_traffic(request(64, 8, router=router), Layout("tokens", 1, 8, 8), STAGE1)
    assert sent.tokens == 4 * 2 * 1024 * 851_968 * 2 * 7 / 8 == 12_213_813_248
    assert sent.total == sent.tokens
    assert tokens_exchange(request(64, 8), STAGE1, 8) == 3_053_453_312
    # two groups of four also reduce their experts' gradients: 3 (W − 1)/W of 16 · 64 · 851,968 weights
    pairs = step_traffic(request(64, 8, router=router), Layout("tokens", 1, 4, 16), STAGE1)
    assert pairs.tokens == 4 * 2 * 1024 * 851_968 * 2 * 3 / 4
    assert pairs.gradients == 3 * 4 * 16 * 64 * 851_968 / 2


@pytest.mark.parametrize(("zero_stage", "times"), [(0, 2), (1, 3), (2, 9)])
def test_replicated_gradients_by_hand(zero_stage: int, times: int) -> None:
    """All-reduce: 2 (W − 1)/W; ZeRO-2 in each of four micro-batches; ZeRO 1 and 2 gather the weights."""
    sent = step_traffic(request(6, 4), Layout("replicate", zero_stage, 1, 6), STAGE1)
    assert sent.total == sent.gradients == times * 4 * 327_155_712 * 3 / 4


def test_zero3_gathers_base_and_experts_in_every_micro_batch() -> None:
    sent = step_traffic(request(6, 4), Layout("weights", 3, 1, 6), STAGE1)
    assert sent.base == 4 * 2 * 2 * 8_030_261_248 * 3 / 4
    assert sent.weights == 4 * weights_exchange(request(6, 4))
    frozen = replace(STAGE2, trains_experts=False, trains_routers=False)
    still = step_traffic(request(6, 4), Layout("weights", 3, 1, 6), frozen)
    assert still.weights == pytest.approx(4 * 2 * 4 * (327_155_712 + 3_145_728) * 3 / 4)


def test_one_rank_sends_nothing() -> None:
    for zero in range(4):
        layout = Layout("weights" if zero == 3 else "replicate", zero, 1, 6)
        assert step_traffic(request(6, 1), layout, STAGE2).total == 0


def test_tokens_inside_a_node_take_the_fast_links() -> None:
    plan, near, far = request(64, 16), Layout("tokens", 1, 8, 8), Layout("tokens", 1, 16, 4)
    cluster = Cluster(16, 8, link_speed=1e9, node_link_speed=1e8)
    for layout, speed in ((near, 1e9), (far, 1e8)):
        sent = step_traffic(plan, layout, STAGE2)
        want = sent.tokens / speed + (sent.total - sent.tokens) / 1e8
        assert step_seconds(sent, layout, cluster) == pytest.approx(want)
