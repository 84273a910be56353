"""Cells that another comparison has finished: which are taken over, and which never."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.comparison_runs import finish, loss

from dsmixer.cli.main import main
from dsmixer.compare.gather import gather
from dsmixer.compare.launching import Resources, check_resources, command, environment
from dsmixer.compare.plan import Plan, make_plan
from dsmixer.compare.reuse import take_over
from dsmixer.compare.state import check_unchanged, method_file, state_of, write_asked
from dsmixer.config.comparison import load_comparison
from dsmixer.config.errors import UserError

File = Callable[..., Path]
RSL = "{name: RSL, set: {stage2.rsl.alpha: 0.2}}"


def planned(path: Path, *overrides: str) -> Plan:
    return make_plan(load_comparison(path, None, ["comparison.seeds=[0]", *overrides]))


@pytest.fixture
def done(comparison_file: File) -> Path:
    """A comparison of which experts, RSL and uniform are done on seed 0."""
    plan = planned(comparison_file())
    experts, rsl, _, _, uniform = plan.cells
    for cell, value in ((experts, 1.0), (rsl, 1.25)):
        finish(cell, [loss("law", "mixture", value)])
        plan.log(cell).parent.mkdir(parents=True, exist_ok=True)
        plan.log(cell).write_text(f"{cell.name}\n")
        plan.log(cell).with_suffix(".json").write_text(
            json.dumps({"seconds": 1.0, "peak_bytes": 7e8, "code": 0})
        )
    write_asked(plan, uniform)
    method_file(plan, uniform).write_text(json.dumps({"rows": [loss("law", "uniform", 1.5)]}))
    (plan.folder / "comparison.yaml").write_text("{}")
    return plan.folder


def took(plan: Plan, *folders: Path) -> list[str]:
    """The first part of the names of the cells that were taken over, and the other comparison is whole."""
    said: list[str] = []
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    take_over(plan, folders, said.append)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    check_unchanged(plan)
    return [line.split(": taken over")[0] for line in said]


def test_a_cell_of_the_same_recipe_is_taken_over_by_whatever_name(comparison_file: File, done: Path) -> None:
    plan = planned(comparison_file((RSL, RSL.replace("RSL", "weight 0.2"))), "run.name=other")
    experts, weight, _, _, uniform = plan.cells
    assert took(plan, done) == [experts.name, weight.name, uniform.name]
    assert [state_of(plan, cell) for cell in plan.cells] == ["done", "done", "not begun", "not begun", "done"]
    assert plan.log(weight).read_text() == "cells/RSL/seed-0\n", "the log of who made it"
    measured = {m["name"]: m["value"] for m in gather(plan).measures if m["variant"] == "weight 0.2"}
    assert measured["peak_memory"] == 7e8
    recipe = weight.folder.with_suffix(".yaml").read_text()
    assert str(experts.folder / "mixture") in recipe, "it runs by itself, on this comparison's experts"
    assert took(plan, done) == [], "what is there stays"


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        (["stage1.learning_rate=0.5"], []),  # other experts, and so another mixture under the routers
        (["stage2.top_k=1", "stage2.renormalize=false"], ["experts", "methods"]),
        (["evaluation.max_examples=3"], []),
        (["stage2.micro_batch_size=2"], ["experts", "methods"]),  # times and memory would be others
        (["comparison.method_settings={uniform: {a: 1}}"], ["experts", "cells"]),
    ],
)
def test_what_was_made_from_other_values_is_not(
    comparison_file: File, done: Path, changes: list[str], taken: list[str]
) -> None:
    plan = planned(comparison_file(), "run.name=other", *changes)
    assert [name.split("/")[0] for name in took(plan, done)] == taken


def test_a_score_of_another_mixture_is_not_taken_over_for_its_name(comparison_file: File, done: Path) -> None:
    """The time of an answer, of a variant that is called the same and was trained in another way."""
    asked = ["comparison.measures=[seconds_per_example]", "run.name=other"]
    there = planned(comparison_file(), asked[0])
    cell = next(cell for cell in there.cells if cell.times == "RSL")
    write_asked(there, cell)
    method_file(there, cell).write_text("{}")
    assert "answers" in {name.split("/")[0] for name in took(planned(comparison_file(), *asked), done)}
    for change in (["stage2.top_k=1", "stage2.renormalize=false"], ["stage1.learning_rate=0.5"]):
        plan = planned(comparison_file(), *asked[:1], "run.name=third", *change)
        assert "answers" not in {name.split("/")[0] for name in took(plan, done)}


def test_what_is_unfinished_there_or_begun_here_is_not(comparison_file: File, done: Path) -> None:
    (done / "cells" / "RSL" / "seed-0" / ".finished").unlink()
    plan = planned(comparison_file(), "run.name=other")
    experts = plan.cells[0]
    finish(experts, [])
    (experts.folder / ".finished").unlink()
    assert [name.split("/")[0] for name in took(plan, done)] == ["methods"]


def test_a_folder_without_a_comparison_is_a_mistake(
    comparison_file: File, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="there is no comparison.yaml"):
        take_over(planned(comparison_file()), [tmp_path], print)
    assert main(["compare", str(comparison_file()), "--reuse", str(tmp_path / "nowhere")]) == 2
    assert "there is no comparison.yaml" in capsys.readouterr().err
    # an override behind the folders is an override, though it stands where a folder could
    flags = ["--reuse", str(tmp_path), "run.name=again", "--list", "--json"]
    assert main(["compare", str(comparison_file()), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(tmp_path / "runs" / "again")


def test_cells_of_several_ranks_have_gpus_of_their_own(
    comparison_file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    plan, resources = planned(comparison_file()), Resources(jobs=2, processes=2)
    check_resources(resources)
    for slot, chosen in enumerate(("4,5", "6,7")):
        words = command(plan, plan.cells[0], resources, slot)
        # told a number of ranks, DeepSpeed's launcher takes the first GPUs, whatever is visible
        assert (
            words[words.index("--include") + 1] == f"localhost:{chosen}" and "--num_accelerators" not in words
        )
        assert environment(resources, slot)["CUDA_VISIBLE_DEVICES"] == chosen
    with pytest.raises(UserError, match="3 cells at once on 2 ranks each need 6 GPUs, and there are 4"):
        check_resources(Resources(jobs=3, processes=2))
    check_resources(Resources(jobs=9, processes=1))


def test_one_cell_of_several_ranks_leaves_the_gpus_to_the_launcher(
    comparison_file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plan = planned(comparison_file())
    words = command(plan, plan.cells[0], Resources(jobs=1, processes=2))
    assert words[words.index("--num_accelerators") + 1] == "2"
