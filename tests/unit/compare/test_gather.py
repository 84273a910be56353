"""What is read from the folders of finished cells, and when a cell that is there is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.comparison_runs import finish, loss

from dsmixer.compare.gather import gather
from dsmixer.compare.plan import Plan, make_plan
from dsmixer.compare.results import results_of
from dsmixer.compare.running import alone_in
from dsmixer.compare.state import check_unchanged, method_file, state_of, write_asked
from dsmixer.config.comparison import load_comparison
from dsmixer.config.errors import UserError

File = Callable[..., Path]


def planned(path: Path, *overrides: str) -> Plan:
    return make_plan(load_comparison(path, None, ["comparison.seeds=[0]", *overrides]))


def test_measures_are_those_of_the_files(comparison_file: File) -> None:
    plan = planned(comparison_file())
    rsl = plan.cells[1]
    finish(rsl, [loss("law", "mixture", 1.0)])
    plan.log(rsl).parent.mkdir(parents=True)
    plan.log(rsl).with_suffix(".json").write_text(json.dumps({"seconds": 9.0, "peak_bytes": 5e8, "code": 0}))
    measured = {m["name"]: m["value"] for m in gather(plan).measures}
    assert measured == pytest.approx(
        {
            "routing_entropy": 0.25,
            "own_first": 0.75,
            "load_variance": 1 / 6,  # of the last tenth of three logged steps: the last
            "seconds": 1.5 * 6,  # every other step was logged
            "seconds_per_step": 1.0,
            "tokens_per_second": 40.0,
            "trainable": 13.0 + 8.0,  # preserve: experts train beside the routers
            "peak_memory": 5e8,
        }
    )


def test_the_time_of_an_answer_is_of_the_cell_that_took_it_and_nothing_else_of_that(
    comparison_file: File,
) -> None:
    plan = planned(comparison_file(), "comparison.measures=[seconds_per_example]")
    rsl, timed = plan.cells[1], next(cell for cell in plan.cells if cell.times == "RSL")
    finish(rsl, [loss("law", "mixture", 1.0)])
    cost = {"trainable": 999, "seconds": 99.0, "seconds_per_example": 0.25, "told": False}
    method_file(plan, timed).parent.mkdir(parents=True)
    scores = {"rows": [loss("law", "mixture", 77.0)], "costs": {"mixture": cost}}
    method_file(plan, timed).write_text(json.dumps(scores))
    found = gather(plan)
    measured = {m["name"]: m["value"] for m in found.measures if m["variant"] == "RSL"}
    assert measured["seconds_per_example"] == 0.25 and measured["trainable"] == 21.0
    assert [row["value"] for row in found.rows] == [1.0]
    row = next(row for row in results_of(plan, found)["table"] if row["row"] == "RSL")
    assert row["measures"]["seconds_per_example"]["mean"] == 0.25


def test_frozen_experts_do_not_count_as_trained(comparison_file: File) -> None:
    plan = planned(comparison_file(), "stage2.experts=frozen")
    finish(plan.cells[1], [loss("law", "mixture", 1.0)])
    assert {m["name"]: m["value"] for m in gather(plan).measures}["trainable"] == 8.0


def test_what_is_not_done_is_missing_and_the_rest_is_there(comparison_file: File) -> None:
    plan = planned(comparison_file())
    experts, rsl, gmoe, *methods = plan.cells
    finish(
        experts,
        [loss("law", "base", 2.0), loss("law", "expert:lawyer", 1.0), loss("law", "expert:other", 3.0)],
    )
    finish(rsl, [loss("law", "mixture", 1.25)])
    results = results_of(plan, gather(plan))
    assert results["missing"] == [gmoe.name, *(cell.name for cell in methods)] and results["cells"] == 5
    rows = {row["row"]: row["cells"] for row in results["table"]}
    assert rows["RSL"]["recovered"]["law"]["mean"] == 0.75, "held against the domain's own expert"
    assert rows["own expert"]["loss"]["law"]["mean"] == 1.0 and "GMoE" not in rows
    assert state_of(plan, gmoe) == "not begun" and state_of(plan, rsl) == "done"


def test_ready_made_experts_are_held_against_as_stage_two_found_them(
    comparison_file: File, tmp_path: Path
) -> None:
    experts = f"[{{name: law, path: {tmp_path}}}, {{name: chess, path: {tmp_path}}}]"
    path = comparison_file(
        ("alpha: 16", f"alpha: 16, experts: {experts}"), ("stage2:\n", "stage1: {enabled: false}\nstage2:\n")
    )
    plan = planned(path)
    rows = [loss("law", "base", 2.0), loss("law", "expert:lawyer@stage1", 1.0), loss("law", "mixture", 1.5)]
    finish(plan.cells[0], rows)
    finish(plan.cells[1], rows)
    table = {row["row"]: row["cells"] for row in results_of(plan, gather(plan))["table"]}
    assert table["RSL"]["recovered"]["law"]["mean"] == 0.5
    assert table["own expert"]["loss"]["law"]["mean"] == 1.0


def test_a_finished_cell_of_other_values_is_refused_and_layout_is_not_another_value(
    comparison_file: File,
) -> None:
    plan = planned(comparison_file())
    finish(plan.cells[1], [])
    check_unchanged(plan)
    check_unchanged(planned(comparison_file(), "mixer.compute=loop", "checkpoint.every=3"))
    with pytest.raises(
        UserError, match="cells/RSL/seed-0 was made from other values: stage2.top_k: 2 there, 1 here"
    ):
        check_unchanged(planned(comparison_file(), "stage2.top_k=1"))
    with pytest.raises(UserError, match=r"evaluation.max_examples: null there, 3 here"):
        check_unchanged(planned(comparison_file(), "evaluation.max_examples=3"))
    with pytest.raises(UserError, match=r"mixer.mixture: .* here"):
        check_unchanged(planned(comparison_file(), "stage1.learning_rate=0.5"))


def test_methods_that_were_asked_otherwise_are_refused(comparison_file: File) -> None:
    plan = planned(comparison_file())
    methods = plan.cells[-1]
    write_asked(plan, methods)
    method_file(plan, methods).write_text('{"rows": []}')
    check_unchanged(plan)
    check_unchanged(planned(comparison_file(), "comparison.methods=[own]"))
    with pytest.raises(UserError, match=r"settings: {} there, {'a': 1} here"):
        check_unchanged(planned(comparison_file(), "comparison.method_settings={uniform: {a: 1}}"))


def test_a_damaged_file_names_itself(comparison_file: File) -> None:
    plan = planned(comparison_file())
    finish(plan.cells[1], [])
    (plan.cells[1].folder / "evaluation.json").write_text('{"rows": [')
    with pytest.raises(UserError, match="evaluation.json: malformed JSON"):
        gather(plan)


def test_two_calls_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(UserError, match="another dsmixer compare works in this folder"):
        with alone_in(tmp_path):
            pass
    with alone_in(tmp_path):
        pass
