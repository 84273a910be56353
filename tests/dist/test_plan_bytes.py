"""Bytes of weights, gradients and optimizer state on every rank of real engines, against the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plan_bytes_ranks
from support.launching import launch
from support.plan_bytes_ranks import BUCKET, CASES, EXPERTS, MIXER, ds_config, llama_config
from transformers import AutoModelForCausalLM

from dsmixer.model.shape import model_shape
from dsmixer.placement.memory import Layout, RankBytes, rank_bytes
from dsmixer.placement.request import FLOAT32, Cluster, EngineSizes, PlanRequest, Pool, StageShape

RANKS = 2
pytestmark = pytest.mark.timeout(900)  # the launch counts for the first test


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, by engine."""
    folder = tmp_path_factory.mktemp("bytes")
    launch(Path(plan_bytes_ranks.__file__), [str(folder)], ranks=RANKS).check()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


def predicted(zero_stage: int, trained: str) -> RankBytes:
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
    )
    request = PlanRequest(
        model=model_shape(model, MIXER["targets"]),
        pool=Pool((MIXER["rank"],) * len(EXPERTS), (1.0,) * len(EXPERTS)),
        cluster=Cluster(RANKS),
        stages=(stage,),
        base_bytes=FLOAT32,
        engine=EngineSizes.from_config(ds_config(zero_stage, 2)["zero_optimization"]),
    )
    mode = "weights" if zero_stage == 3 else "replicate"
    return rank_bytes(request, Layout(mode, zero_stage, 1, len(EXPERTS)), stage)


@pytest.mark.parametrize(("zero_stage", "trained"), CASES)
def test_weights_gradients_and_optimizer_state_are_as_predicted(
    measured: list[dict[str, Any]], zero_stage: int, trained: str
) -> None:
    """``replicate`` with ZeRO 0, 1, 2 and ``weights`` with ZeRO 3, on both ranks, within 5 %."""
    plan = predicted(zero_stage, trained)
    # the bucket that gradients are reduced in is a buffer: ZeRO-3 has it from the start, ZeRO-1 between steps
    bucket = FLOAT32 * BUCKET if zero_stage in (1, 3) else 0
    # ZeRO-3 makes the memory of its gradients with the engine
    at_start = bucket + plan.gradients if zero_stage == 3 else 0
    for rank in measured:
        found = rank[f"zero{zero_stage}_{trained}"]
        weights = plan.base + plan.experts + plan.routers
        assert found["weights"] == pytest.approx(weights, rel=0.05)
        optimizer = found["engine"] - found["weights"] - at_start
        assert optimizer == pytest.approx(plan.optimizer, rel=0.05)
        if zero_stage < 3:
            gradients = max(found["accumulated"] - bucket, found["backward"]) - found["engine"]
            assert gradients == pytest.approx(plan.gradients, rel=0.05)
        held = max(found["accumulated"], found["backward"])
        assert held == pytest.approx(plan.held + bucket, rel=0.05)


def test_before_the_engine_every_rank_has_the_whole_pool(measured: list[dict[str, Any]]) -> None:
    """Which is what the plan counts as the start."""
    whole = predicted(0, "all")
    for rank in measured:
        weights = whole.base + whole.experts + whole.routers
        assert rank["zero3_all"]["loaded"] == pytest.approx(weights, rel=1e-3)  # and a few buffers
