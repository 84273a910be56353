"""What the host does in a step: it waits for a device where it has to, and its work does not grow with the
pool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.launching import REPOSITORY, launch_environment

SMALL, LARGE = 8, 64
FETCH, REACHED, SIZES = (
    "training/nonfinite.py:fetch",
    "training/stages.py:_reached",
    "placement/exchange.py:_route",
)
TRAINED = ("preserve", "preserve, all chosen", "preserve, all chosen, ZeRO-2", "preserve, tokens travel")
CASES = ("stage one", "frozen", *TRAINED)
Steps = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """What the ways to wait came to, and then each case with both pools."""
    script = Path(__file__).with_name("steps_in_one_process.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=REPOSITORY,
        env=launch_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def steps(lines: list[dict[str, Any]]) -> Steps:
    return {(step["case"], step["experts"]): step for step in lines[1:]}


def ours(step: dict[str, Any]) -> dict[str, int]:
    """The waits of this package; other libraries' files are known by their whole paths."""
    return {place: count for place, count in step["waits"].items() if not place.startswith(os.sep)}


def test_every_way_to_ask_for_a_value_is_seen(lines: list[dict[str, Any]]) -> None:
    assert len(lines[0]) > 5 and {*lines[0].values()} == {1}, lines[0]


@pytest.mark.parametrize("case", ["stage one", "frozen"])
@pytest.mark.parametrize("num_experts", [SMALL, LARGE])
def test_a_step_waits_once_for_all_its_numbers(steps: Steps, case: str, num_experts: int) -> None:
    """Losses, gradient norms, what is not finite, and the experts that were chosen."""
    assert ours(steps[case, num_experts]) == {FETCH: 1}


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("num_experts", [SMALL, LARGE])
def test_where_chosen_experts_train_it_waits_for_their_names_too(
    steps: Steps, case: str, num_experts: int
) -> None:
    """And, where tokens travel, for the sizes of each exchange."""
    step = steps[case, num_experts]
    sizes = {SIZES: step["dispatches"]} if "travel" in case else {}
    assert ours(step) == {FETCH: 1, REACHED: 1, **sizes}


@pytest.mark.parametrize("case", CASES)
def test_python_s_work_is_the_same_for_a_large_pool(steps: Steps, case: str) -> None:
    """Instruction by instruction, for the same tokens, whether eight experts are chosen or all."""
    small, large = steps[case, SMALL], steps[case, LARGE]
    everyone = "all" in case
    assert (small["chosen"], large["chosen"]) == (
        (None, None) if case == "stage one" else (SMALL, LARGE if everyone else SMALL)
    )
    if case in TRAINED:
        assert (small["reached"], large["reached"]) == (small["chosen"], large["chosen"])
    assert sum(small["instructions"].values()) > 10_000
    assert small["instructions"] == large["instructions"]
