"""Bytes a rank against figures worked by hand and against real models on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.placement.llama3 import STAGE1, STAGE2, layout, llama3_8b, llama3_shape, request

from dsmixer.experts.bank import padded_rank
from dsmixer.model.count import count_weights
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.placement.memory import (
    Layout,
    base_bytes,
    expert_weights,
    load_bytes,
    rank_bytes,
    router_weights,
)
from dsmixer.placement.owners import Owners, owners_of, pack_slots
from dsmixer.placement.request import FLOAT32, Pool

BASE = 8_030_261_248
EXPERTS = 327_155_712  # six of rank 64: 6 · 32 · 64 · 26,624
ROUTERS = 3_145_728


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.parametrize("ranks", [(64,) * 6, (8, 16, 24)])
def test_counts_are_those_of_the_real_model_with_real_mixers(router: str, ranks: tuple[int, ...]) -> None:
    """LLaMA3-8B; the plan counts stacked banks, so the padding of unequal ranks as well."""
    names = [f"e{i}" for i in range(len(ranks))]
    config = MixerConfig("qkvo", names, ranks=dict(zip(names, ranks, strict=True)), router=router)
    mixture = attach_mixers(llama3_8b(), config)
    stacked = sum(p.numel() for _, p in mixture.expert_parameters())
    plan = replace(request(6, 1), pool=Pool(ranks, (1.0,) * len(ranks), router=router))
    assert plan.model.num_weights == count_weights(mixture).base == BASE
    assert plan.pool.rank == padded_rank(ranks)
    assert expert_weights(plan, len(ranks)) == stacked
    assert router_weights(plan) == count_weights(mixture).routers


def test_the_design_s_figure_for_4096_routers() -> None:
    assert router_weights(request(4096, 64)) == 32 * 4 * 4096 * 4096 == 2_147_483_648
    assert router_weights(request(4096, 64, router="per_block")) == 2_147_483_648 // 2


@pytest.mark.parametrize(
    ("zero_stage", "base", "experts", "gradients", "copies"),
    [(0, 1, 1, 1, 2), (1, 1, 1, 1, 3 / 4), (2, 1, 1, 1 / 4, 3 / 4), (3, 1 / 4, 1 / 4, 1 / 4, 3 / 4)],
)
def test_six_experts_on_four_ranks_by_hand(
    zero_stage: int, base: float, experts: float, gradients: float, copies: float
) -> None:
    """Shares of the whole; ``copies``: moments and float32 copy."""
    mode = "weights" if zero_stage == 3 else "replicate"
    found = rank_bytes(request(6, 4), layout(mode, zero_stage, 1, 6), STAGE1)
    assert found.base == pytest.approx(2 * BASE * base, rel=1e-3)
    assert found.experts == 4 * EXPERTS * experts
    # routers of 24,576 weights are below DeepSpeed's persistence threshold: whole beside their part
    assert found.routers == 4 * ROUTERS * (experts + (zero_stage == 3))
    assert found.gradients == 4 * EXPERTS * gradients
    assert found.optimizer == 4 * EXPERTS * copies


def test_stage_two_adds_the_routers_and_the_origin() -> None:
    found = rank_bytes(request(6, 4), layout("replicate", 2, 1, 6), STAGE2)
    assert found.gradients == EXPERTS + ROUTERS
    assert found.optimizer == 4 * (EXPERTS + ROUTERS)
    frozen = replace(STAGE2, trains_experts=False, keeps_origin=False)
    assert rank_bytes(request(6, 4), layout("replicate", 2, 1, 6), frozen).optimizer == 3 * ROUTERS


def test_in_tokens_mode_a_rank_holds_its_own_experts_and_zero_cuts_over_their_owners() -> None:
    """64 experts on EP 4 x EDP 2: 16 held, cut in two; the base over all eight."""
    found = rank_bytes(request(64, 8), layout("tokens", 3, 4, 64), STAGE1)
    assert found.experts == 4 * EXPERTS * 16 // 6 // 2
    assert found.base == pytest.approx(2 * BASE / 8, rel=1e-2)


def test_a_rank_s_bytes_follow_from_its_own_experts_and_without_a_rank_it_is_the_fullest() -> None:
    """Loads 4, 1, 1, 1, 1 on EP 2: the large one alone, the small ones together."""
    spread = Layout("tokens", 1, owners_of(pack_slots([4, 1, 1, 1, 1], 2), 2))
    assert sorted(spread.held) == [1, 4] and spread.most_held == 4
    few, many = (rank_bytes(request(5, 4), spread, STAGE1, spread.held.index(n)) for n in (1, 4))
    assert (few.experts, many.experts) == (4 * EXPERTS // 6, 4 * 4 * EXPERTS // 6)
    assert rank_bytes(request(5, 4), spread, STAGE1) == many


def test_an_expert_with_several_owners_needs_memory_to_add_up_its_gradient() -> None:
    """Its weights in float32, before the optimizer's step; small next to the step where ZeRO cuts nothing."""
    parts = (((0, 0.5), (1, 0.5)), ((1, 1.0),))
    spread = Layout("tokens", 3, Owners(parts, (1.0, 1.0)))
    plan = request(2, 64)
    assert spread.shared_with(64) == ((64,), (64,))
    assert rank_bytes(plan, spread, STAGE1).update == 4 * expert_weights(plan, 1) == 4 * EXPERTS // 6
    frozen = replace(STAGE2, trains_experts=False, keeps_origin=False)
    assert rank_bytes(plan, spread, frozen).update < 4 * expert_weights(plan, 1)


def test_a_four_bit_base_keeps_embeddings_and_head_and_zero3_cuts_all_but_the_scales() -> None:
    """LLaMA3-8B in NF4: 5.70 GB with 8-bit scales, 6.03 without; the norms stay whole on every rank."""
    packed = replace(request(6, 8), four_bit=True)
    norms = 65 * 4096
    outside = 2 * 128256 * 4096 + norms  # embeddings, head, norms
    inside = BASE - outside
    scales = {True: inside // 64 + 4 * inside // (64 * 256), False: 4 * inside // 64}
    replicated, cut = layout("replicate", 2, 1, 6), layout("weights", 3, 1, 6)
    for double in (True, False):
        plan = replace(packed, double_quantization=double)
        assert base_bytes(plan, replicated) == pytest.approx(
            inside // 2 + scales[double] + 2 * outside, abs=1
        )
        parts = (inside // 2 + 2 * outside) // 8 + 2 * norms
        assert base_bytes(plan, cut) == pytest.approx(parts + scales[double], abs=1)
        in_flight = 2 * 4096 * 14336
        for where in (replicated, cut):
            assert load_bytes(plan, where) == base_bytes(plan, replicated) + in_flight
    assert base_bytes(packed, replicated) == pytest.approx(5.70e9, rel=2e-3)


def test_zero3_starts_with_the_parts_of_a_rank_and_one_whole_bank() -> None:
    pool = 4 * expert_weights(request(64, 8), 64)
    found = rank_bytes(request(64, 8), layout("weights", 3, 1, 64), STAGE1)
    assert pool / 8 < found.start - found.base < pool / 4
    replicated = rank_bytes(request(64, 8), layout("replicate", 2, 1, 64), STAGE1)
    assert replicated.start > replicated.base + pool


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300),
    st.sampled_from([1, 2, 4, 8, 64]),
    st.integers(0, 3),
    st.sampled_from([STAGE1, STAGE2]),
)
def test_more_ranks_never_hold_more_and_the_peak_covers_all_that_is_held(
    experts: int, world: int, zero: int, stage: object
) -> None:
    whole = layout("weights" if zero == 3 else "replicate", zero, 1, experts)
    one, two = (rank_bytes(request(experts, w), whole, stage) for w in (world, 2 * world))  # type: ignore[arg-type]
    assert two.held <= one.held
    assert one.peak >= one.held + one.activations
    assert one.peak >= one.start


def test_six_experts_on_one_card_with_a_four_bit_base_stay_below_15_gb() -> None:
    """The design's promise for float32 AdamW at sequence 1024, batch 1."""
    plan = replace(request(6, 1), four_bit=True)
    found = rank_bytes(plan, layout("replicate", 0, 1, 6), STAGE2)
    assert found.peak < 15e9
    assert found.held == found.base + 4 * (EXPERTS + ROUTERS) * (1 + 1 + 3)


def test_the_shape_knows_llama_s_layers() -> None:
    layer = llama3_shape().layer
    assert (layer.hidden, layer.mlp, layer.gated, layer.query, layer.key_value) == (
        4096,
        14336,
        True,
        4096,
        1024,
    )
    assert llama3_shape().width == 32 * 26_624
    assert FLOAT32 == 4
