"""Bytes of weights, gradients and optimizer state on every rank of real engines, against the plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plan_bytes_ranks
from support.launching import launch
from support.plan_bytes_ranks import (
    BUCKET,
    CASES,
    ELSEWHERE,
    EXPERTS,
    MIXER,
    SPREAD,
    SPREAD_STAGES,
    ds_config,
    llama_config,
)
from transformers import AutoModelForCausalLM

from dsmixer.model.shape import model_shape
from dsmixer.placement.memory import Layout, RankBytes, rank_bytes
from dsmixer.placement.owners import Owners
from dsmixer.placement.request import FLOAT32, Cluster, EngineSizes, PlanRequest, Pool, StageShape

RANKS = 4
PLANNED_AS = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
pytestmark = pytest.mark.timeout(900)  # the launch counts for the first test


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, by engine."""
    folder = tmp_path_factory.mktemp("bytes")
    launch(Path(plan_bytes_ranks.__file__), [str(folder)], ranks=RANKS).check()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


def predicted(
    zero_stage: int,
    trained: str,
    owned: tuple[tuple[int, ...], ...] | None = None,
    place: int = 0,
    eight_bit: bool = False,
    offload: Sequence[str] = (),
) -> RankBytes:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config())
    stage = StageShape(
        name=trained,
        rows=1,
        max_length=12,
        accumulation=2,
        trains_experts=trained != "routers",
        trains_routers=trained != "experts",
        keeps_origin=trained == "all",
        top_k=None if trained == "experts" else MIXER["top_k"],
        eight_bit=eight_bit,
    )
    request = PlanRequest(
        model=model_shape(model, MIXER["targets"]),
        pool=Pool((MIXER["rank"],) * len(EXPERTS), (1.0,) * len(EXPERTS)),
        cluster=Cluster(RANKS),
        stages=(stage,),
        base_bytes=FLOAT32,
        engine=EngineSizes.from_config(ds_config(zero_stage, 2)["zero_optimization"]),
        offload=frozenset(PLANNED_AS[key] for key in offload),
    )
    mode = "tokens" if owned else "weights" if zero_stage == 3 else "replicate"
    spread = owned or (tuple(range(len(EXPERTS))),)
    holders = [[rank for rank, experts in enumerate(spread) if e in experts] for e in range(len(EXPERTS))]
    parts = tuple(tuple((rank, 1 / len(ranks)) for rank in ranks) for ranks in holders)
    layout = Layout(mode, zero_stage, Owners(parts, (1.0,) * len(spread)))
    return rank_bytes(request, layout, stage, place)


@pytest.mark.parametrize(("zero_stage", "trained"), CASES)
def test_weights_gradients_and_optimizer_state_are_as_predicted(
    measured: list[dict[str, Any]], zero_stage: int, trained: str
) -> None:
    """``replicate`` with ZeRO 0, 1, 2 and ``weights`` with ZeRO 3, on every rank, within 5 %."""
    plan = predicted(zero_stage, trained)
    for rank in measured:
        compare(rank[f"zero{zero_stage}_{trained}"], plan, zero_stage, BUCKET)


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize("zero_stage", SPREAD_STAGES)
def test_in_tokens_mode_they_are_as_predicted_for_the_experts_of_each_rank(
    measured: list[dict[str, Any]], zero_stage: int, name: str
) -> None:
    """EP 4 and EP 2 of 4, ranks with more and fewer experts, one of them with several owners."""
    owned = SPREAD[name]
    weights = set()
    for number, rank in enumerate(measured):
        plan = predicted(zero_stage, "all", owned, number % len(owned))
        # ZeRO-1 and 2 reduce each gradient by itself where ranks hold different experts
        compare(rank[f"zero{zero_stage}_{name}"], plan, zero_stage, BUCKET if zero_stage == 3 else 1)
        weights.add(plan.experts)
    assert len(weights) == len({len(experts) for experts in owned}) > 1


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_kept_on_the_host_or_in_8_bits_is_as_predicted(
    measured: list[dict[str, Any]], name: str
) -> None:
    """Where the ranks run on the CPU, host and device are one memory: their sum is looked at."""
    zero_stage, settings, offload = ELSEWHERE[name]
    plan = predicted(zero_stage, "all", eight_bit=settings.keep.precision == "8bit", offload=offload)
    plain = predicted(zero_stage, "all")
    bucket = FLOAT32 * BUCKET if zero_stage in (1, 3) else 0
    assert (plan.host > 0) == bool(offload)
    for rank in measured:
        found = rank[name]
        held = max(found["accumulated"], found["backward"])
        print(
            f"{name}: optimizer {found['engine'] - found['weights']:,}, held {held:,}: "
            f"{held / (plan.held + plan.host + bucket):.3f} of the plan; "
            f"without it {plain.held + bucket:,}"
        )
        assert held == pytest.approx(plan.held + plan.host + bucket, rel=0.05)


def compare(found: dict[str, int], plan: RankBytes, zero_stage: int, bucket_size: int) -> None:
    """What a rank was seen to hold against the plan, within 5 %."""
    # the bucket that gradients are reduced in is a buffer: ZeRO-3 has it from the start, ZeRO-1 between steps
    bucket = FLOAT32 * bucket_size if zero_stage in (1, 3) else 0
    # ZeRO-3 makes the memory of its gradients with the engine
    at_start = bucket + plan.gradients if zero_stage == 3 else 0
    weights = plan.base + plan.experts + plan.routers
    optimizer = found["engine"] - found["weights"] - at_start
    gradients = max(found["accumulated"] - bucket, found["backward"]) - found["engine"]
    held = max(found["accumulated"], found["backward"])
    print(
        f"ZeRO {zero_stage}: weights {found['weights'] / weights:.3f}, "
        f"optimizer {optimizer / plan.optimizer:.3f}, gradients {gradients / plan.gradients:.3f}, "
        f"held {held / (plan.held + bucket):.3f} of the plan"
    )
    assert found["weights"] == pytest.approx(weights, rel=0.05)
    assert optimizer == pytest.approx(plan.optimizer, rel=0.05)
    if zero_stage < 3:
        # ZeRO-2 may leave a rank with what was last in the bucket: the gradients of one layer's routers
        assert gradients == pytest.approx(plan.gradients, rel=0.05 if zero_stage < 2 else 0.08)
    assert held == pytest.approx(plan.held + bucket, rel=0.05)


def test_zero3_cuts_each_bank_as_soon_as_it_is_made(measured: list[dict[str, Any]]) -> None:
    """No rank ever holds the whole pool: beside its parts there is one bank, and one router."""
    whole, plan = predicted(0, "all"), predicted(3, "all")
    pool = whole.experts + whole.routers
    for rank in measured:
        found = rank["zero3_all"]
        assert found["made"] - whole.base < 0.5 * pool, "the base is loaded whole in this test"
        made = FLOAT32 * 5 * 8 * 256  # lora_A and lora_B of q or o, five experts of rank 8
        assert found["made"] - whole.base <= 1.05 * (plan.experts + plan.routers + made)
        assert found["loaded"] - whole.base == pytest.approx(plan.experts + plan.routers, rel=0.05)
