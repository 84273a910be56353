"""Stage two against one autograd graph a step; experts that no token reached; frozen experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.cases import IDLE_EXPERTS, names
from support.comparing import WEIGHTS, RunRecord, Tensors, moved_share
from support.launching import TIMEOUT_SECONDS
from support.oracles import PlainStageTwo

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)


@pytest.mark.parametrize("name", names("soft_oracle"))
def test_stage_two_equals_autograd_of_task_rsl_and_preserve_in_one_process(runs: Any, name: str) -> None:
    """Every term's value, the gradient norm and the weights after every step; preserve holds two of three."""
    run = runs[name]
    torch.set_num_threads(1)
    plain = PlainStageTwo(*runs.recipe(name), run.tensors(1))
    start = plain.weights()
    rows = [row for row in run.rows if row["stage"] == 2]
    apart: dict[str, float] = {}
    for step, row in enumerate(rows):
        for key, value in plain.run_step(step).items():
            if key == "preserve" and step == 0:
                assert value == row[key] == 0.0
                continue
            apart[key] = max(apart.get(key, 0.0), abs(row[key] - value) / abs(value))
        share = moved_share(run.tensors(2, step=step + 1), plain.weights(), start)
        apart["weights"] = max(apart.get("weights", 0.0), share)
    print(f"{name}: " + " ".join(f"{key} {value:.1e}" for key, value in apart.items()))
    assert apart["task_loss"] < 1e-5 and apart["rsl"] < 1e-5 and apart["routing_entropy"] < 1e-5
    assert apart["grad_norm"] < 1e-4 and apart["preserve"] < 1e-3 and apart["weights"] < WEIGHTS


def _before(run: RunRecord, kind: str, step: int) -> Tensors:
    """State of stage two before a step (from 1); zeros for moments before the first."""
    if step > 1:
        return run.tensors(2, kind, step - 1)
    if kind == "weights":
        return run.tensors(1)
    return {key: torch.zeros_like(t) for key, t in run.tensors(2, kind, 1).items()}


def _still(old: Tensors, new: Tensors, expert: int) -> bool:
    """Whether an expert's part of all banks is the same in every bit."""
    banks = [key for key in new if ".bank." in key]
    assert len(banks) == 4
    return all(torch.equal(old[key][expert], new[key][expert]) for key in banks)


@pytest.mark.parametrize("name", names("idle"))
def test_an_expert_that_no_token_reached_keeps_weights_moments_and_step_count(runs: Any, name: str) -> None:
    """Among them experts that had moved before, whom momentum and preserve would both move."""
    run = runs[name]
    idle = idle_and_away = moved = 0
    counts = [0] * len(IDLE_EXPERTS)
    for row in (row for row in run.rows if row["stage"] == 2):
        step = row["step"]
        loads = [row[f"load/{expert}"] for expert in IDLE_EXPERTS]
        *counted, routers = run.unit_steps(2, step)
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            old, new = _before(run, kind, step), run.tensors(2, kind, step)
            for e, load in enumerate(loads):
                if load == 0:
                    assert _still(old, new, e), f"{kind} of {IDLE_EXPERTS[e]} in step {step}"
                elif kind == "weights":
                    moved += not _still(old, new, e)
        origin, weights = run.tensors(2, "origin", step), run.tensors(2, step=step)
        for e, load in enumerate(loads):
            assert counted[e] == counts[e] + (load > 0)
            idle += load == 0
            idle_and_away += load == 0 and not _still(origin, weights, e)
        assert routers == step
        counts = counted
    print(f"{name}: {idle} idle expert-steps, {idle_and_away} of them after the expert moved; {moved} moves")
    assert idle_and_away > 5 and moved > 5


@pytest.mark.parametrize("name", names("frozen"))
def test_frozen_experts_do_not_move_in_stage_two_and_routers_do(runs: Any, name: str) -> None:
    run = runs[name]
    live, trained, start = run.live(), run.tensors(1), runs.start(name)
    assert trained and all(torch.equal(live[key], tensor) for key, tensor in trained.items())
    routers = run.tensors(2)
    assert routers.keys() == live.keys() - trained.keys()
    assert not any(torch.equal(live[key], start[key]) for key in routers)
