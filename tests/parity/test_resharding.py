"""A run saved in one layout goes on in another, and one whose disk is full for a moment goes on at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from parity.cases import RESHARDED, SAVED
from support.comparing import RunRecord, distance, same_bits
from support.launching import TIMEOUT_SECONDS

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)


def layout_of(run: RunRecord, stage: int, step: int) -> dict[str, int]:
    """Ranks, ZeRO stage and EP that saved a checkpoint."""
    path: Path = run.folder / "checkpoints" / f"stage{stage}" / f"step-{step:08d}" / "state.json"
    found: dict[str, int] = json.loads(path.read_text())["layout"]
    return found


@pytest.mark.parametrize("name", RESHARDED)
def test_a_run_saved_on_two_ranks_goes_on_in_another_layout_as_if_uninterrupted(runs: Any, name: str) -> None:
    """Losses to float32 rounding, norms, and the weights of both stages; the rows of a step are kept."""
    reference, run = runs[SAVED], runs[name]
    layout, (stage, step), _ = RESHARDED[name]
    apart = distance(run, reference, runs.start(SAVED))
    print(f"{name}: {apart}")
    assert apart.within(), str(apart)
    then = {"ranks": 2, "zero_stage": 2, "expert_parallel_size": 2}
    now = {
        "ranks": layout.ranks,
        "zero_stage": layout.zero_stage,
        "expert_parallel_size": layout.expert_parallel_size,
    }
    assert layout_of(run, stage, step) == then and layout_of(run, 2, 6) == now
    assert run.unit_steps(2) == reference.unit_steps(2)
    said = runs.output(name)
    assert f"stage {stage} goes on after step {step}" in said, said
    assert ("keeps its 8 rows a step" in said) == (layout.ranks != 2), said


def test_going_back_keeps_what_was_saved_later(runs: Any) -> None:
    """The run on one rank had everything of the run on two, and was sent back into stage one."""
    run = runs["reshard_w1"]
    aside = run.folder / "checkpoints" / "set-aside" / "001"
    kept = sorted(f"{path.parent.name}/{path.name}" for path in aside.glob("*/*"))
    assert kept == [f"stage{s}/step-{n:08d}" for s, n in ((1, 6), (2, 3), (2, 6))]
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 12 and len(run.rows) == 12


def test_other_mathematics_goes_on_where_it_is_allowed(runs: Any) -> None:
    """Another seed, so other rows, and another rate: the steps before stay, those after differ."""
    reference, run = runs[SAVED], runs["changed_w1"]
    apart = (run.column("loss", 1) - reference.column("loss", 1)).abs() / reference.column("loss", 1)
    assert bool((apart[:3] < 1e-5).all()) and bool((apart[3:] > 1e-4).all()), apart
    assert len(run.rows) == 12
    noted = json.loads((run.folder / "changes.jsonl").read_text())
    assert noted["after"] == "stage1/step-00000003"
    assert any(change.startswith("run.seed: 3 there, 4 here") for change in noted["changes"])


def test_a_save_that_one_rank_cannot_write_leaves_the_run_alive(runs: Any) -> None:
    """One warning, no half checkpoint, and the run ends as if nothing had been."""
    run = runs["full_between"]
    same_bits(run, runs["w2z2"])
    assert run.steps(1) == [6] and run.steps(2) == [3, 6]
    assert not list(run.folder.glob("checkpoints/*/.*"))
    said = runs.output("full_between")
    assert said.count("could not be saved") == 1, said
    assert "dsmixer: warning: step 3 of stage 1" in said and "rank 1" in said and "the run goes on" in said


def test_the_end_of_a_stage_that_cannot_be_saved_ends_the_run_and_is_taken_up_again(runs: Any) -> None:
    """Stage two does not begin upon what is not on the disk; the same command then makes up for it."""
    run = runs["full_at_the_end"]
    same_bits(run, runs["w2z2"])
    assert run.steps(1) == [3, 6]
    said = runs.output("full_at_the_end")
    assert "dsmixer: error: step 6 of stage 1 could not be saved" in said, said
    assert "step-00000003 is whole" in said and "stage 1 goes on after step 3" in said, said
