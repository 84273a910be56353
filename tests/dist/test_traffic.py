"""What four ranks of real runs send, collective by collective, against the plan."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import traffic_ranks
from support.launching import launch
from support.tiny import UNEVEN_SIZES, write_recipe
from support.traffic_ranks import EVEN, EVEN_TOKENS, EVEN_WIDTH, RANKS

from dsmixer.placement.copies import copies_of
from dsmixer.placement.owners import Owners
from dsmixer.placement.plan import Plan
from dsmixer.placement.traffic import others, pairs_exchange, tokens_exchange, weights_exchange

COMMON = (
    "stage1.max_steps=1",
    "stage2.max_steps=1",
    "checkpoint.every=100",
    "base.dtype=bfloat16",
)
"""Tokens and base in bfloat16, what trains in float32: dtypes tell the messages apart."""
MICRO_BATCHES = 2


def tokens(ep: int, *more: str) -> tuple[str, ...]:
    return ("placement.mode=tokens", f"placement.expert_parallel_size={ep}", *more)


def zero(stage: int) -> str:
    return f"deepspeed.zero_stage={stage}"


CHECKPOINTED = "base.activation_checkpointing=true"
AS_NEEDED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""ZeRO-3 that keeps nothing gathered which it could gather again."""
TWO_STEPS = ("stage1.max_steps=2", "stage2.max_steps=2")
"""In the first one ZeRO-3 finds out in which order its weights are wanted."""
ONE_STAGE = ("stage2.enabled=false", "stage1.max_steps=2")
TOKENS = {
    "ep4_zero1": tokens(4, zero(1)),
    "ep2_zero2_per_block": tokens(2, zero(2), "mixer.router=per_block"),
    "ep2_zero3_run_again": tokens(2, CHECKPOINTED, "deepspeed.config={folder}/as_needed.json"),
    "every_expert": tokens(4, zero(1), "stage2.routing=soft"),
}
LONG = os.environ.get("DSMIXER_LONG") == "1"
LONG_RUNS = {
    "weights_kept": ("placement.mode=weights", "deepspeed.config={folder}/kept.json", *ONE_STAGE),
    "weights_run_again": (
        "placement.mode=weights",
        "deepspeed.config={folder}/as_needed.json",
        *ONE_STAGE,
        CHECKPOINTED,
    ),
}
RUNS = {
    **TOKENS,
    **(LONG_RUNS if LONG else {}),
    "weights": ("placement.mode=weights", "deepspeed.config={folder}/as_needed.json", *TWO_STEPS),
    "weights_nf4": (
        "placement.mode=weights",
        "deepspeed.config={folder}/as_needed.json",
        *ONE_STAGE,
        "base.quantization=nf4",
    ),
    "replicate_zero1": ("placement.mode=replicate", zero(1)),
    "replicate_zero2": ("placement.mode=replicate", zero(2)),
}
pytestmark = pytest.mark.timeout(900)  # the launch counts for the first test

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank sent, by run."""
    folder = tmp_path_factory.mktemp("traffic")
    recipe = write_recipe(folder / "recipe", sizes=UNEVEN_SIZES)
    for name, block in (("as_needed", AS_NEEDED), ("kept", {"stage3_param_persistence_threshold": 0})):
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": {"stage": 3, **block}}))
    cases = [
        {
            "name": name,
            "recipe": str(recipe),
            "overrides": [*COMMON, *(text.format(folder=folder) for text in run)],
        }
        for name, run in RUNS.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(Path(traffic_ranks.__file__), [str(folder / "cases.json")], ranks=RANKS).check()
    # written by our own processes just now; plans among tensors need pickle
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]


def last_step(run: dict[str, Any], stage: str) -> dict[str, Any]:
    step: dict[str, Any] = run["steps"][stage][-1]
    return step


def sent(calls: Iterable[dict[str, Any]], *, kind: str = "", dtype: str = "", phase: str = "") -> float:
    return sum(
        call["sent"]
        for call in calls
        if kind in call["kind"] and dtype in call["dtype"] and phase in call["phase"]
    )


def of_group(found: Found, name: str, rank: int) -> list[dict[str, Any]]:
    size = len(found[0][name]["owned"])
    first = rank // size * size
    return [found[other][name] for other in range(first, first + size)]


@pytest.mark.parametrize("name", RUNS)
def test_no_collective_of_a_step_was_missed(name: str, found: Found) -> None:
    """As many were seen in each process group as its backend counted."""
    for rank in found:
        assert rank[name]["missed"] == {}
        assert rank[name]["steps"]["stage1"]


@pytest.mark.parametrize("name", TOKENS)
def test_stage_one_sends_no_token_also_of_an_expert_with_several_owners(name: str, found: Found) -> None:
    owned = found[0][name]["owned"]
    held = [expert for experts in owned for expert in experts]
    assert len(held) > len(set(held)) == len(UNEVEN_SIZES), "an expert has several owners"
    for rank in found:
        for step in rank[name]["steps"]["stage1"]:
            assert not [call for call in step["calls"] if "alltoall" in call["kind"]]
        plan: Plan = rank[name]["plan"]
        assert plan.chosen.traffic["stage1"].exchanged == 0.0
        assert sent(last_step(rank[name], "stage2")["calls"], kind="alltoall") > 0


@pytest.mark.parametrize("name", TOKENS)
def test_in_stage_two_a_rank_sends_what_the_chosen_experts_say(name: str, found: Found) -> None:
    """Every byte of every rank, from the experts of each token: inputs and sums, pairs, and counts."""
    for rank in range(RANKS):
        group = of_group(found, name, rank)
        place, plan = rank % len(group), found[rank][name]["plan"]
        calls = last_step(found[rank][name], "stage2")["calls"]
        want_tokens = want_pairs = 0.0
        for index, (width, outs, first) in enumerate(dispatches(plan) * MICRO_BATCHES):
            away = sum(c for q, c in enumerate(copies_at(group[place], index)) if q != place)
            into = sum(copies_at(run, index)[place] for q, run in enumerate(group) if q != place)
            forwards = 2 if plan.request.checkpointing else 1
            back = into if plan.request.checkpointing or not first else 0
            want_tokens += 2 * (forwards * (away * width + into * outs) + back * width + away * outs)
            named = plan.request.stages[1].named(plan.request.pool.num_experts)
            want_pairs += 4 * 2 * named * (forwards * away + into) + forwards * 8 * (len(group) - 1)
        assert sent(calls, kind="alltoall", dtype="bfloat16") == want_tokens
        assert sent(calls, kind="alltoall") - want_tokens == want_pairs


def dispatches(plan: Plan) -> list[tuple[int, int, bool]]:
    """Of each dispatch of a micro-batch its D, the Σ O that it serves, and whether its input is the first."""
    projections, together = plan.request.model.projections, plan.request.pool.router == "per_block"
    blocks: dict[str, list[int]] = {}
    for i, projection in enumerate(projections):
        blocks.setdefault(projection.block if together else str(i), []).append(i)
    return [
        (
            projections[members[0]].in_features,
            sum(projections[i].out_features for i in members),
            projections[members[0]].block == projections[0].block,
        )
        for members in blocks.values()
    ]


def copies_at(run: dict[str, Any], index: int) -> list[int]:
    copies: list[int] = last_step(run, "stage2")["dispatches"][index]["copies"]
    return copies


def test_where_every_expert_answers_the_plan_is_exact(found: Found) -> None:
    """No routing to guess: K̂ of each rank's tokens follows from the owners alone."""
    plan: Plan = found[0]["every_expert"]["plan"]
    num_experts = plan.request.pool.num_experts
    copies = copies_of(plan.chosen.owners, num_experts)
    want_tokens = want_pairs = seen_tokens = seen = 0.0
    for rank, run in enumerate(found):
        step = last_step(run["every_expert"], "stage2")
        for dispatch in step["dispatches"][:: len(dispatches(plan))]:  # one of each micro-batch
            n, moved = dispatch["tokens"], copies.sent[rank]
            want_tokens += tokens_exchange(plan.request, n, moved)
            want_pairs += pairs_exchange(plan.request, n, moved, num_experts, RANKS)
        seen_tokens += sent(step["calls"], kind="alltoall", dtype="bfloat16")
        seen += sent(step["calls"], kind="alltoall")
    print(
        f"tokens {seen_tokens:.0f} of {want_tokens:.0f}, pairs {seen - seen_tokens:.0f} of {want_pairs:.0f}"
    )
    assert seen_tokens == pytest.approx(want_tokens, rel=1e-12)
    assert seen - seen_tokens == pytest.approx(want_pairs, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in TOKENS if name != "every_expert"])
def test_the_plan_s_formula_holds_with_the_copies_that_there_were(name: str, found: Found) -> None:
    """One K̂ for all projections, as the plan has it, is off by as much as projections route differently."""
    plan: Plan = found[0][name]["plan"]
    size = len(found[0][name]["owned"])
    copies = num_tokens = 0
    for rank, run in enumerate(found):
        for dispatch in last_step(run[name], "stage2")["dispatches"]:
            copies += sum(c for q, c in enumerate(dispatch["copies"]) if q != rank % size)
            num_tokens += dispatch["tokens"]
    mean, tokens_of_all = copies / num_tokens, num_tokens // len(dispatches(plan))
    calls = [last_step(run[name], "stage2")["calls"] for run in found]
    seen = sum(sent(c, kind="alltoall", dtype="bfloat16") for c in calls)
    want = tokens_exchange(plan.request, tokens_of_all, mean)
    print(f"{name}: K̂ {mean:.3f}, tokens {seen:.0f} of {want:.0f}: {seen / want:.3f}")
    assert seen == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("name", EVEN)
def test_copies_are_as_planned_where_tokens_choose_evenly(name: str, found: Found) -> None:
    owned, top_k = EVEN[name]
    ranks_of: dict[int, list[int]] = {}
    for rank, experts in enumerate(owned):
        for expert in experts:
            ranks_of.setdefault(expert, []).append(rank)
    parts = tuple(tuple((r, 1 / len(ranks)) for r in ranks) for _, ranks in sorted(ranks_of.items()))
    copies = copies_of(Owners(parts, (1.0,) * len(owned)), top_k)
    for rank in range(RANKS):
        counts, pairs, inputs, sums = (call["sent"] for call in found[rank]["even"][name])
        place = rank % len(owned)
        out = inputs / (4 * EVEN_WIDTH) / EVEN_TOKENS
        back = sums / (4 * EVEN_WIDTH) / EVEN_TOKENS
        planned = (copies.sent[place], copies.received[place])
        print(f"{name} rank {rank}: {out:.3f}, {back:.3f} of {planned}")
        assert out == pytest.approx(copies.sent[place], rel=0.03)
        assert back == pytest.approx(copies.received[place], rel=0.03)
        assert pairs == round(out * EVEN_TOKENS) * 2 * top_k * 4 and counts == 8 * (len(owned) - 1)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_zero_3_gathers_and_scatters_the_experts_as_the_formula_says(stage: str, found: Found) -> None:
    """3 · R · E · Σ(D + O) · b_w · (W − 1)/W a micro-batch; in stage two the routers beside them.

    In stage two deepspeed leaves k, v and o of the first layer gathered for the micro-batch that follows,
    which in a model of two layers is a ninth: so the first micro-batch of a step is held to the formula.
    """
    for rank in found:
        plan: Plan = rank["weights"]["plan"]
        calls = last_step(rank["weights"], stage)["calls"]
        first = [call for call in calls if call["phase"] == "micro-batch 0"]
        seen = experts_sent(first)
        routers = 3 * 4 * plan.request.pool.num_experts * sum(plan.request.dispatches) * others(RANKS)
        want = weights_exchange(plan.request) + (routers if stage == "stage2" else 0.0)
        planned = plan.chosen.traffic[stage]
        base = sent(calls, kind="allgather", dtype="bfloat16")
        print(
            f"{stage}: weights {seen:.0f} of {want:.0f} a micro-batch, {experts_sent(calls):.0f} of "
            f"{planned.weights:.0f} a step, base {base:.0f} of {planned.base:.0f}"
        )
        assert seen == pytest.approx(want, rel=1e-6)
        assert planned.weights == pytest.approx(MICRO_BATCHES * want, rel=1e-6)
        assert experts_sent(calls) == pytest.approx(planned.weights, rel=0.05 if stage == "stage1" else 0.07)
        assert planned.base == pytest.approx(base, rel=0.05)


def experts_sent(calls: list[dict[str, Any]]) -> float:
    """What trains is in float32, and the only thing that ZeRO-3 scatters."""
    return sent(calls, kind="allgather", dtype="float32") + sent(calls, kind="reduce_scatter")


@pytest.mark.skipif(not LONG, reason="long: DSMIXER_LONG=1")
def test_zero_3_gathers_a_third_time_where_layers_are_run_again(found: Found) -> None:
    for rank in found:
        plan: Plan = rank["weights_run_again"]["plan"]
        calls = last_step(rank["weights_run_again"], "stage1")["calls"]
        planned = plan.chosen.traffic["stage1"]
        assert experts_sent(calls) == pytest.approx(MICRO_BATCHES * weights_exchange(plan.request) * 4 / 3)
        assert planned.weights == pytest.approx(experts_sent(calls), rel=1e-6)
        assert planned.base == pytest.approx(sent(calls, kind="allgather", dtype="bfloat16"), rel=0.05)


def test_zero_3_gathers_a_base_in_4_bits_packed(found: Found) -> None:
    """Forward and backward, as the plan says: of the packed layers a quarter of their bytes in bfloat16."""
    for rank in found:
        plan: Plan = rank["weights_nf4"]["plan"]
        base, unpacked = (
            sent(last_step(rank[name], "stage1")["calls"], kind="allgather", dtype="bfloat16")
            for name in ("weights_nf4", "weights")
        )
        print(f"nf4: base {base:.0f} of {plan.chosen.traffic['stage1'].base:.0f}, unpacked {unpacked:.0f}")
        assert plan.chosen.traffic["stage1"].base == pytest.approx(base, rel=0.05)
        assert base < 0.8 * unpacked, "embeddings and head are most of this small model"


@pytest.mark.skipif(not LONG, reason="long: DSMIXER_LONG=1")
def test_zero_3_keeps_what_is_wanted_again_soon(found: Found) -> None:
    """Of this small model that is everything: it is gathered once a micro-batch."""
    for rank in found:
        plan: Plan = rank["weights_kept"]["plan"]
        calls = last_step(rank["weights_kept"], "stage1")["calls"]
        weights = experts_sent(calls)
        assert weights == pytest.approx(MICRO_BATCHES * weights_exchange(plan.request) * 2 / 3)
        assert plan.chosen.traffic["stage1"].weights == pytest.approx(weights, rel=0.05)
        base = sent(calls, kind="allgather", dtype="bfloat16")
        assert plan.chosen.traffic["stage1"].base == pytest.approx(base, rel=0.05)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("name", ["replicate_zero1", "replicate_zero2", "ep4_zero1", "ep2_zero2_per_block"])
def test_gradients_are_as_planned(name: str, stage: str, found: Found) -> None:
    """All but the tokens and one small message with losses and statistics, on the rank that sends most."""
    by_rank = []
    for rank in found:
        calls = [c for c in last_step(rank[name], stage)["calls"] if "alltoall" not in c["kind"]]
        by_rank.append(sent(calls) - sent(calls, phase="losses"))
    planned = found[0][name]["plan"].chosen.traffic[stage].gradients
    print(f"{name} {stage}: {[round(b) for b in by_rank]}, planned {planned:.0f}")
    assert max(by_rank) == pytest.approx(planned, rel=0.01)


def test_an_expert_with_several_owners_costs_one_all_reduce_a_step(found: Found) -> None:
    """Over the ranks that hold it, of all its weights in float32, under ZeRO-3 too."""
    for name in TOKENS:
        plan: Plan = found[0][name]["plan"]
        one = plan.request.pool.rank * plan.request.model.width
        owned = plan.chosen.owners
        for rank, run in enumerate(found):
            place = rank % plan.expert_parallel_size
            want = sorted(
                len(parts) * (RANKS // plan.expert_parallel_size)
                for parts in owned.parts
                if len(parts) > 1 and place in dict(parts)
            )
            for stage in ("stage1", "stage2"):
                calls = [c for c in last_step(run[name], stage)["calls"] if c["phase"] == "update"]
                shared = [c["ranks"] for c in calls if c["numel"] == one and c["kind"] == "allreduce_"]
                assert sorted(shared) == want
