"""What a plan decides, says and refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.placement.llama3 import STAGE1, STAGE2, request

from dsmixer.config.errors import UserError
from dsmixer.experts.choice import MEASURED
from dsmixer.placement import activations
from dsmixer.placement.owners import owners_of, pack_slots
from dsmixer.placement.plan import make_plan
from dsmixer.placement.request import ZERO_STAGES, EngineSizes


def test_the_choice_is_the_layout_that_fits_and_sends_least() -> None:
    plan = make_plan(request(64, 8, 80))
    fitting = [c for c in plan.candidates if c.fits]
    assert plan.chosen.fits and plan.chosen.sent == min(c.sent for c in fitting)
    assert {c.layout.mode for c in plan.candidates} == {"replicate", "weights", "tokens"}
    assert all(c.layout.zero_stage in ZERO_STAGES[c.layout.mode] for c in plan.candidates)


def test_a_small_device_moves_the_choice_to_a_layout_that_holds_less() -> None:
    large, small = (make_plan(request(64, 8, memory, mode="replicate")) for memory in (80, 48))
    assert (large.zero_stage, small.zero_stage) == (1, 2)
    assert small.chosen.peak < large.chosen.peak and small.chosen.sent > large.chosen.sent
    assert make_plan(request(64, 8, 24)).zero_stage == 3


def test_link_speeds_decide_by_time_instead_of_bytes() -> None:
    """Two nodes. EP 8 keeps the tokens inside a node, and sends gradients to the other: 128 experts in groups
    of 16, held twice, 3 · 4 · 16 · 64 · 851,968 / 2 a stage, which is 5.23 GB."""
    plan = request(128, 16, 80)
    least = make_plan(plan)
    assert least.chosen.sent == min(c.sent for c in least.candidates)
    linked = replace(plan.cluster, link_speed=450e9, node_link_speed=5e9)
    quickest = make_plan(replace(plan, cluster=linked))
    assert (quickest.expert_parallel_size, quickest.zero_stage) == (8, 1)
    two = quickest.chosen.traffic["stage2"]
    far = 2 * 5.234e9 + 3 * 4 * 128 * 32 * 4 * 4096 * 15 / 16
    assert quickest.chosen.sent - two.exchanged == pytest.approx(far, rel=1e-3)
    assert quickest.chosen.seconds == pytest.approx(far / 5e9 + two.exchanged / 450e9, rel=1e-3)
    across = next(
        c for c in quickest.candidates if (c.layout.expert_parallel_size, c.layout.zero_stage) == (16, 1)
    )
    assert across.seconds is not None and across.seconds > 2 * (quickest.chosen.seconds or 0)


def test_the_reason_is_an_inequality_with_its_numbers() -> None:
    plan = make_plan(request(64, 8, 80, mode="auto", expert_parallel_size=8))
    assert plan.mode == "tokens"
    free = make_plan(request(64, 8, 80))
    assert f"{free.chosen.sent / 1e9:.2f} GB a step < 73.64 GB a step of replicate with ZeRO 1" in free.reason
    # K̂ of EP 8 is 7 (1 - 56 · 55 · 54 / (64 · 63 · 62)), and layers are run again
    assert "1024·2.343·3·851,968·2 = 12.26 GB < " in plan.exchange
    assert "3·64·64·851,968·4·0.875 = 36.64 GB" in plan.exchange
    assert plan.exchange.endswith("(EP 8, K 3); stage one sends no tokens")
    once = make_plan(request(64, 8, 80, expert_parallel_size=8, checkpointing=False))
    assert "n·K̂·(2·Σ(D+O)−D₀)·b_x = 1024·2.343·(2·851,968−12,288)·2 = 8.12 GB < " in once.exchange


def test_with_stage_one_alone_no_token_is_sent() -> None:
    plan = make_plan(request(64, 8, 80, stages=(STAGE1,), router="per_block"))
    assert plan.mode == "tokens" and plan.chosen.sent == 0.0
    assert plan.exchange.startswith("weights 3·R·E") and plan.exchange.endswith("stage one sends no tokens")


def test_the_slots_of_a_run_decide_who_owns_what() -> None:
    """A domain as large as the others together lies on half of the ranks."""
    slots = pack_slots([5, 1, 1, 1, 1, 1], 4)
    plan = make_plan(request(6, 4, 80, mode="tokens", expert_parallel_size=4, slots=slots))
    assert plan.chosen.owners == owners_of(slots, 4)
    assert len(plan.to_dict()["owners"]["0"]) == 2
    alike = make_plan(request(6, 4, 80, mode="tokens", expert_parallel_size=4))
    assert alike.chosen.owners != plan.chosen.owners


def test_small_pools_send_little_either_way() -> None:
    """Six experts on one node: what they weigh is less than the tokens, so that they stay with every rank."""
    for world in (2, 4, 8):
        plan = make_plan(request(6, world, 80))
        assert plan.chosen.sent == min(c.sent for c in plan.candidates if c.fits)
        assert plan.mode == "replicate"


def test_one_router_a_block_is_proposed_once_experts_outnumber_an_eighth_of_the_width() -> None:
    few, many = make_plan(request(512, 64)), make_plan(request(513, 64))
    assert not any("per_block" in note for note in few.notes)
    assert any("E = 513 > D/8 = 512" in note for note in many.notes)
    assert not any("per_block" in n for n in make_plan(request(513, 64, router="per_block")).notes)


def test_where_nothing_fits_it_says_what_would_and_each_of_those_fits() -> None:
    short = request(6, 1, 24, checkpointing=False)
    plan = make_plan(short)
    assert plan.chosen.fits is False and any(note.startswith("does not fit") for note in plan.notes)
    text = "\n".join(plan.remedies)
    assert "nf4" in text and "ranks" in text
    assert make_plan(replace(short, four_bit=True)).chosen.fits


def test_remedies_name_more_than_one_change_where_one_is_not_enough() -> None:
    tiny = make_plan(request(6, 1, 6, checkpointing=False))
    assert tiny.chosen.fits is False
    assert tiny.remedies and "," in tiny.remedies[0]


def test_four_thousand_experts_need_tokens() -> None:
    stages = (STAGE1, replace(STAGE2, trains_experts=False, keeps_origin=False))
    plan = make_plan(request(4096, 64, 80, stages=stages))
    assert (plan.mode, plan.zero_stage, plan.expert_parallel_size) == ("tokens", 3, 64)
    assert plan.chosen.fits
    assert not any(c.fits for c in plan.candidates if c.layout.mode != "tokens")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.sampled_from([1, 2, 3, 6, 8, 12, 16]))
def test_expert_parallel_sizes_divide_the_world_and_leave_no_rank_without_an_expert(
    experts: int, world: int
) -> None:
    for candidate in make_plan(request(experts, world)).candidates:
        ep = candidate.layout.expert_parallel_size
        assert world % ep == 0 and ep <= max(1, experts)
        assert (ep > 1) == (candidate.layout.mode == "tokens")
        assert all(candidate.owners.held(rank) for rank in range(ep))


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "tokens", "zero_stage": 0},
        {"mode": "replicate", "zero_stage": 3},
        {"mode": "weights", "zero_stage": 2},
        {"expert_parallel_size": 3},
        {"mode": "replicate", "expert_parallel_size": 2},
    ],
)
def test_pairs_that_do_not_go_together_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UserError) as error:
        make_plan(request(6, 4, **changes))
    assert error.value.fix


def test_the_plan_is_plain_json_and_names_owners() -> None:
    plan = make_plan(request(5, 4, 80, mode="tokens", expert_parallel_size=2))
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["expert_data_parallel_size"] == 2
    assert sorted(values["owners"]) == list("01234")
    assert set(values["bytes_per_rank"]) == set(values["bytes_sent_per_step"]) == {"stage1", "stage2"}


def test_the_plan_knows_when_the_dense_form_ends() -> None:
    assert MEASURED.costs["cuda"].always == activations.DENSE_LIMIT


def test_engine_sizes_come_from_the_engine_s_own_block() -> None:
    sizes = EngineSizes.from_config({"reduce_bucket_size": 5, "stage3_max_live_parameters": 7, "stage": 3})
    assert (sizes.reduce_bucket, sizes.max_live, sizes.prefetch) == (5, 7, EngineSizes().prefetch)


def test_every_place_of_a_group_is_told_apart_in_the_plans_json() -> None:
    """One expert with most of the tokens: its ranks hold it alone, and the last ones many."""
    pool = request(64, 8, 80, mode="tokens", zero_stage=1, expert_parallel_size=8)
    skewed = replace(pool, pool=replace(pool.pool, tokens=(300.0, *[1.0] * 63)))
    told = make_plan(skewed).to_dict()
    places = told["places"]
    assert [place["ep_rank"] for place in places] == list(range(8))
    assert min(place["experts"] for place in places) == 1 < max(place["experts"] for place in places)
    assert all(place["load_over_mean"] <= 1.0801 for place in places)
    most = max(places, key=lambda place: place["experts"])
    assert most["peak_bytes"]["stage1"] == told["bytes_per_rank"]["stage1"]["peak"]
    few = min(places, key=lambda place: place["experts"])
    assert few["held_bytes"]["stage1"] < most["held_bytes"]["stage1"]
