"""What a plan decides, says and refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.placement.llama3 import STAGE1, STAGE2, request

from dsmixer.config.errors import UserError
from dsmixer.experts.forms import DENSE_LIMIT
from dsmixer.placement import activations
from dsmixer.placement.plan import make_plan
from dsmixer.placement.request import ZERO_STAGES, EngineSizes

TRAINER = ("replicate", "weights")
"""A trainer that runs some of the modes, as a run with ``placement.mode: auto`` does."""


def test_the_choice_is_the_layout_that_fits_and_sends_least() -> None:
    plan = make_plan(request(64, 8, 80))
    fitting = [c for c in plan.candidates if c.fits]
    assert plan.chosen.fits and plan.chosen.sent == min(c.sent for c in fitting)
    assert {c.layout.mode for c in plan.candidates} == {"replicate", "weights", "tokens"}
    assert all(c.layout.zero_stage in ZERO_STAGES[c.layout.mode] for c in plan.candidates)


def test_the_trainer_s_plan_takes_only_what_it_runs_and_says_what_would_be_better() -> None:
    plan = make_plan(request(64, 8, 80, available_modes=TRAINER))
    assert plan.mode == "replicate" and plan.chosen == plan.runnable
    assert any("tokens with ZeRO 1 and EP 8 would be better" in note for note in plan.notes)
    free = make_plan(request(64, 8, 80, available_modes=TRAINER, only_available=False))
    assert free.mode == "tokens" and not free.chosen.available
    assert free.runnable is not None and free.runnable.layout == plan.chosen.layout


def test_a_small_device_moves_the_choice_to_a_layout_that_holds_less() -> None:
    large = make_plan(request(64, 8, 80, available_modes=TRAINER))
    small = make_plan(request(64, 8, 48, available_modes=TRAINER))
    assert (large.zero_stage, small.zero_stage) == (1, 2)
    assert small.chosen.peak < large.chosen.peak and small.chosen.sent > large.chosen.sent


def test_link_speeds_decide_by_time_instead_of_bytes() -> None:
    """Two nodes: EP 16 sends least, EP 8 keeps the tokens inside a node."""
    plan = request(64, 16, 80)
    assert make_plan(plan).expert_parallel_size == 16
    linked = replace(plan.cluster, link_speed=450e9, node_link_speed=5e9)
    assert make_plan(replace(plan, cluster=linked)).expert_parallel_size == 8


def test_the_reason_is_an_inequality_with_its_numbers() -> None:
    plan = make_plan(request(64, 8, 80))
    assert "32.60 GB a step < 519.39 GB a step of weights" in plan.reason
    assert "2·1024·2.641·851,968·2·0.875 = 8.06 GB < " in plan.exchange
    assert "3·64·64·851,968·4·0.875 = 36.64 GB" in plan.exchange


def test_one_router_a_block_is_proposed_once_experts_outnumber_an_eighth_of_the_width() -> None:
    few, many = make_plan(request(512, 64)), make_plan(request(513, 64))
    assert not any("per_block" in note for note in few.notes)
    assert any("E = 513 > D/8 = 512" in note for note in many.notes)
    assert not any("per_block" in n for n in make_plan(request(513, 64, router="per_block")).notes)


def test_where_nothing_fits_it_says_what_would_and_each_of_those_fits() -> None:
    short = request(6, 1, 24, checkpointing=False, available_modes=TRAINER)
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


def test_a_mode_the_trainer_does_not_run_is_refused_for_training() -> None:
    with pytest.raises(UserError, match="tokens is not supported by this version"):
        make_plan(request(6, 4, mode="tokens", available_modes=TRAINER))


def test_the_plan_is_plain_json_and_names_owners() -> None:
    plan = make_plan(request(5, 4, 80, mode="tokens", expert_parallel_size=2))
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["expert_data_parallel_size"] == 2
    assert sorted(values["owners"]) == list("01234")
    assert set(values["bytes_per_rank"]) == set(values["bytes_sent_per_step"]) == {"stage1", "stage2"}


def test_the_plan_knows_when_the_dense_form_ends() -> None:
    assert activations.DENSE_LIMIT == DENSE_LIMIT


def test_engine_sizes_come_from_the_engine_s_own_block() -> None:
    sizes = EngineSizes.from_config({"reduce_bucket_size": 5, "stage3_max_live_parameters": 7, "stage": 3})
    assert (sizes.reduce_bucket, sizes.max_live, sizes.prefetch) == (5, 7, EngineSizes().prefetch)
