"""The same mathematics wherever the experts are: modes, ZeRO stages, EP and world sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from parity.cases import PLACED_LIKE, expert_faults, placed_cases
from support.comparing import distance
from support.launching import TIMEOUT_SECONDS

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

REFERENCE = "w1_replicate_z0"
PLACED = [case.name for case in placed_cases()]
SPREAD_OUT = [case.name for case in placed_cases() if "placement.mode=tokens" in case.overrides]


def _reference(name: str) -> str:
    variant = name.rsplit("_", 1)[1]
    return f"{REFERENCE}_{PLACED_LIKE.get(variant, variant)}"


@pytest.mark.parametrize("name", [n for n in PLACED if n != _reference(n)])
def test_placement_changes_neither_losses_nor_norms_nor_weights(runs: Any, name: str) -> None:
    """Ten steps of each stage, clipping at work, wide routers, an expert with several owners."""
    reference = runs[_reference(name)]
    apart = distance(runs[name], reference, runs.start(_reference(name)))
    print(f"{name}: {apart}")
    assert apart.within(), str(apart)


@pytest.mark.parametrize("name", SPREAD_OUT)
def test_owners_of_one_expert_hold_the_same_bits(runs: Any, name: str) -> None:
    plan = json.loads((runs[name].folder / "plan.json").read_text())
    owners = {expert: list(ranks) for expert, ranks in plan["owners"].items()}
    assert plan["mode"] == "tokens" and any(len(ranks) > 1 for ranks in owners.values())
    assert len({rank for ranks in owners.values() for rank in ranks}) == plan["expert_parallel_size"]
    assert runs[name].observed()["owners_apart"] == []


def test_the_reference_clips_and_lacks_a_domain_in_some_step(runs: Any) -> None:
    """Otherwise the tests above would prove less than they say."""
    reference = runs[f"{REFERENCE}_preserve6"]
    assert bool((reference.column("grad_norm") > 0.5 * 7**0.5).any()), "with seven units, one was clipped"
    steps = reference.unit_steps(1)[:-1]
    assert max(steps) == 10 and min(steps) < 10, "an expert without tokens is left as it is"


@pytest.mark.parametrize("fault", expert_faults())
def test_a_wrong_scale_among_owners_is_seen_by_this_comparison(runs: Any, fault: str) -> None:
    """Gradients of an expert's owners not added up, counted once an owner, or preserve once a rank."""
    apart = distance(
        runs[f"fault_{fault}"], runs[f"{REFERENCE}_preserve6"], runs.start(f"{REFERENCE}_preserve6")
    )
    print(f"{fault}: {apart}")
    assert not apart.within()
