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
    assert free.notes[0] == (
        "a run takes tokens only by name: placement.mode: tokens; with auto and deepspeed.zero_stage: 1 it "
        f"takes replicate (a peak of {free.runnable.peak / 1e9:.2f} GB, 73.64 GB sent a step)"
    )
    named = make_plan(request(64, 8, 80, mode="tokens"))
    assert not any("by name" in note for note in (*plan.notes[1:], *named.notes))


def test_a_small_device_moves_the_choice_to_a_layout_that_holds_less() -> None:
    large = make_plan(request(64, 8, 80, available_modes=TRAINER))
    small = make_plan(request(64, 8, 48, available_modes=TRAINER))
    assert (large.zero_stage, small.zero_stage) == (1, 2)
    assert small.chosen.peak < large.chosen.peak and small.chosen.sent > large.chosen.sent


def test_link_speeds_decide_by_time_instead_of_bytes() -> None:
    """Two nodes: EP 16 sends least, EP 8 keeps the tokens inside a node.

    A step of each stage under ZeRO-1, in GB: tokens 4 · 2 · 1,024 · (1 + K̂) · 851,968 · 2 · (EP − 1)/EP,
    which is 49.9 for EP 16 (K̂ = 2.816) and 44.5 for EP 8 (2.641); gradients of the routers 0.75, and for
    EP 8, where two ranks hold the same experts, twice 3 · 4 · 16 · 64 · 851,968 / 2 = 5.23: 50.7 against
    55.7. But between nodes at 5 GB/s EP 16 takes 10.1 s, and EP 8 sends 11.2 there: 2.2 s, with 0.1 s inside.
    """
    plan = request(128, 16, 80)
    least = make_plan(plan)
    assert (least.expert_parallel_size, least.zero_stage) == (16, 1)
    assert least.chosen.sent == pytest.approx(50.7e9, rel=1e-3)
    linked = replace(plan.cluster, link_speed=450e9, node_link_speed=5e9)
    quickest = make_plan(replace(plan, cluster=linked))
    assert (quickest.expert_parallel_size, quickest.zero_stage) == (8, 1)
    assert quickest.chosen.sent == pytest.approx(55.7e9, rel=1e-3)
    assert quickest.chosen.seconds == pytest.approx(11.2 / 5 + 44.5 / 450, rel=1e-2)


def test_the_reason_is_an_inequality_with_its_numbers() -> None:
    """Tokens of both stages 4 · (3.053 + 8.063) GB, and 0.352 GB of the routers' gradients: 44.82 GB."""
    plan = make_plan(request(64, 8, 80))
    assert "44.82 GB a step < 519.39 GB a step of weights" in plan.reason
    assert "2·1024·2.641·851,968·2·0.875 = 8.06 GB < " in plan.exchange
    assert "3·64·64·851,968·4·0.875 = 36.64 GB" in plan.exchange
    assert "in stage one, K 1: tokens 2·1024·1.000·851,968·2·0.875 = 3.05 GB" in plan.exchange
    assert "(EP 8, K 3)" in plan.exchange


def test_with_stage_one_alone_the_exchange_is_that_of_one_expert_a_token() -> None:
    text = make_plan(request(64, 8, 80, stages=(STAGE1,), router="per_block")).exchange
    assert "2·1024·1.000·851,968·2·0.875 = 3.05 GB < weights" in text and text.endswith("(EP 8, K 1)")


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


def test_a_mode_that_a_run_takes_by_name_only_is_refused_where_it_is_the_only_one_left() -> None:
    with pytest.raises(UserError, match="a run takes tokens by name only") as error:
        make_plan(request(6, 4, mode="tokens", available_modes=TRAINER))
    assert error.value.fix == "write mode: tokens"


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
