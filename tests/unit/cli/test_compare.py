"""``dsmixer compare`` on the embedded model and data: two variants, two seeds, other methods beside.

The figures of the table are worked out here once more, in plain Python, from what each cell has written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.launching import REPOSITORY, launch_environment

LONG = os.environ.get("DSMIXER_LONG") == "1"
SEEDS, VARIANTS, DOMAINS = (0, 1), ("RSL", "no loss / none"), ("brackets", "reviews")
PATIENCE = 600.0
EMBEDDED = REPOSITORY / "launch" / "embedded"


def write_comparison(folder: Path, name: str = "losses") -> Path:
    """A comparison of two variants with a handful of steps; its folder is ``folder/name``."""
    domains = [
        {
            "name": domain,
            "train": str(EMBEDDED / "domains" / domain / "train.jsonl"),
            "test": str(EMBEDDED / "domains" / domain / "test.jsonl"),
            "max_train": 48,
            "max_test": 8,
        }
        for domain in DOMAINS
    ]
    stage = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 2e-3}
    losses = [{"stage2.routing_loss": "lora_mixer"}, {"stage2.routing_loss": "none"}]
    values = {
        "comparison": {
            "name": name,
            "title": "Losses on the routers",
            "seeds": list(SEEDS),
            "variants": [{"name": n, "set": s} for n, s in zip(VARIANTS, losses, strict=True)],
            "methods": ["own", "uniform"],
            "plots": ["scores", "loads", "entropy", "losses"],
        },
        "run": {"dir": str(folder), "tensorboard": False},
        "base": {"model": str(EMBEDDED / "base"), "dtype": "float32"},
        "data": {"max_length": 128, "domains": domains},
        "mixer": {"rank": 4, "alpha": 8, "dropout": 0.0, "router_std": 0.5},
        "stage1": {**stage, "max_steps": 6},
        "stage2": {**stage, "max_steps": 30, "data": {"max_examples": 12}},
        "checkpoint": {"every": 5},
        "evaluation": {"exact_match": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


def compare(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dsmixer", "compare", *map(str, arguments)],
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> tuple[Any, str]:
    """Its JSON, if any, and what it said, once it has ended with this code."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return (json.loads(out) if out.strip() else None), err


def stopped(process: subprocess.Popen[str], ready: Callable[[], bool], number: int = signal.SIGTERM) -> str:
    """Signal the command as soon as something is there; what it said, after it has ended."""
    until = time.monotonic() + PATIENCE
    while not ready() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    return err


def states(path: Path) -> dict[str, str]:
    listed, _ = finished(compare(path, "--list", "--json"))
    return {cell["cell"]: cell["state"] for cell in listed["cells"]}


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A comparison that was stopped in the middle of a variant's stage two and gone on with: file, folder,
    and the name of the cell that was stopped."""
    folder = tmp_path_factory.mktemp("compare")
    path = write_comparison(folder)
    cell = "cells/RSL/seed-0"
    metrics = folder / "losses" / cell / "metrics.jsonl"
    said = stopped(
        compare(path, "--jobs", 2, "--json"), lambda: metrics.exists() and metrics.stat().st_size > 0
    )
    assert f"{cell}: stopped after" in said and "run the same command again" in said
    outcome, _ = finished(compare(path, "--jobs", 2, "--json"))
    assert {entry["how"] for entry in outcome["cells"]} == {"was done", "done"}
    return path, folder / "losses", cell


def test_a_stopped_comparison_has_saved_and_goes_on_to_the_rows_of_one_left_alone(
    interrupted: tuple[Path, Path, str], tmp_path: Path
) -> None:
    _, folder, cell = interrupted
    log = (folder / "logs" / f"{cell}.log").read_text()
    assert log.count("$ ") == 2 and "run the same command again to go on" in log and "goes on" in log.lower()
    alone = [sys.executable, "-m", "dsmixer", "train", "--config", str(folder / f"{cell}.yaml")]
    alone += [f"run.dir={tmp_path}", "run.name=alone"]
    subprocess.run(alone, cwd=REPOSITORY, env=launch_environment(), check=True, capture_output=True)
    there, here = (
        json.loads((f / "evaluation.json").read_text()) for f in (tmp_path / "alone", folder / cell)
    )
    assert here["rows"] == there["rows"]


def test_the_table_is_what_plain_python_makes_of_the_cells_files(
    interrupted: tuple[Path, Path, str],
) -> None:
    _, folder, _ = interrupted
    table = {row["row"]: row["cells"] for row in results(folder)["table"]}
    assert [*table] == ["majority class", "base", "own expert", "uniform", *VARIANTS]
    experts = {seed: rows_of(only(folder.glob(f"experts/*/seed-{seed}/evaluation.json"))) for seed in SEEDS}
    methods = {seed: rows_of(only(folder.glob(f"methods/*/uniform/seed-{seed}.json"))) for seed in SEEDS}
    for variant, name in zip(VARIANTS, ("RSL", "no-loss-none-*"), strict=True):
        cells = {
            seed: rows_of(only(folder.glob(f"cells/{name}/seed-{seed}/evaluation.json"))) for seed in SEEDS
        }
        shares = {}
        for domain in DOMAINS:
            losses = [cells[seed][domain, "mixture", "loss"] for seed in SEEDS]
            expect(table[variant]["loss"][domain], losses)
            base = [experts[seed][domain, "base", "loss"] for seed in SEEDS]
            own = [experts[seed][domain, f"expert:{domain}", "loss"] for seed in SEEDS]
            shares[domain] = [(b - m) / (b - o) for b, m, o in zip(base, losses, own, strict=True)]
            expect(table[variant]["recovered"][domain], shares[domain])
            expect(table["base"]["loss"][domain], base)
            expect(table["own expert"]["loss"][domain], own)
            expect(table["uniform"]["loss"][domain], [methods[s][domain, "uniform", "loss"] for s in SEEDS])
        expect(
            table[variant]["recovered"]["mean of domains"],
            [sum(s) / 2 for s in zip(*shares.values(), strict=True)],
        )
        expect(
            table[variant]["accuracy"]["reviews"], [cells[s]["reviews", "mixture", "accuracy"] for s in SEEDS]
        )
    expect(
        table["majority class"]["accuracy"]["reviews"],
        [experts[s]["reviews", "majority", "accuracy"] for s in SEEDS],
    )
    losses = [table[variant]["loss"]["brackets"]["mean"] for variant in VARIANTS]
    assert losses[0] != losses[1], "the variants are two"


def only(paths: Any) -> Path:
    (path,) = paths
    return Path(path)


def rows_of(path: Path) -> dict[tuple[str, str, str], float]:
    rows = json.loads(path.read_text())["rows"]
    return {(row["domain"], row["method"], row["metric"]): row["value"] for row in rows}


def expect(figure: dict[str, Any], values: list[float]) -> None:
    """Two seeds: their mean and their range."""
    assert figure["mean"] == pytest.approx(sum(values) / 2, rel=1e-12)
    assert figure["spread"] == pytest.approx(abs(values[0] - values[1]), abs=1e-12)
    assert figure["spread_is"] == "range" and list(figure["values"].values()) == pytest.approx(values)


def test_seeds_share_no_draw_and_variants_share_their_experts(interrupted: tuple[Path, Path, str]) -> None:
    _, folder, _ = interrupted
    found = results(folder)
    assert len({row["trunk"] for row in found["rows"]}) == 1
    base = [row["value"] for row in found["rows"] if row["method"] == "base" and row["metric"] == "loss"]
    assert len(set(base)) == len(base) == 4, "each seed draws its own test examples"
    entropy = [m for m in found["measures"] if m["name"] == "routing_entropy"]
    assert {(m["variant"], m["seed"]) for m in entropy} == {(v, s) for v in VARIANTS for s in SEEDS}


def test_a_second_call_runs_nothing_and_writes_the_same(interrupted: tuple[Path, Path, str]) -> None:
    path, folder, _ = interrupted
    before = {
        p: p.read_bytes() for p in (folder / "results.json", folder / "table.md", folder / "index.html")
    }
    logs = {p: p.stat().st_mtime_ns for p in folder.glob("logs/**/*")}
    outcome, said = finished(compare(path, "--json"))
    assert {entry["how"] for entry in outcome["cells"]} == {"was done"} and "started" not in said
    assert {p: p.read_bytes() for p in before} == before
    assert {p: p.stat().st_mtime_ns for p in folder.glob("logs/**/*")} == logs


def test_other_values_on_the_same_folder_are_refused_with_the_way_on(
    interrupted: tuple[Path, Path, str],
) -> None:
    path, folder, _ = interrupted
    _, said = finished(compare(path, "stage2.top_k=1", "stage2.renormalize=false"), 2)
    assert "cells/RSL/seed-0 was made from other values: stage2.top_k: 2 there, 1 here" in said
    assert "run.name=NAME" in said and f"rm -r {folder}" in said
    _, said = finished(compare(path, "evaluation.max_examples=2", "--seeds", "0"), 2)
    assert "evaluation.max_examples: null there, 2 here" in said
    _, said = finished(compare(path, "--seeds", "0", "comparison.method_settings={uniform: {a: 1}}"), 2)
    assert "methods/" in said and "made from other values" in said


def test_another_comparison_takes_over_what_is_the_same(
    interrupted: tuple[Path, Path, str], tmp_path: Path
) -> None:
    _, folder, _ = interrupted
    path = write_comparison(tmp_path, "again")
    outcome, said = finished(compare(path, "--reuse", folder, "--json"))
    assert {entry["how"] for entry in outcome["cells"]} == {"was done"} and "started" not in said
    assert said.count(": taken over from ") == len(outcome["cells"])
    mine, theirs = results(tmp_path / "again"), results(folder)
    assert (mine["rows"], mine["table"], mine["curves"]) == (
        theirs["rows"],
        theirs["table"],
        theirs["curves"],
    )


@pytest.mark.skipif(not LONG, reason="runs and kills a comparison several times; set DSMIXER_LONG=1")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_again_and_again_it_ends_with_the_rows_of_the_other(
    interrupted: tuple[Path, Path, str], tmp_path: Path, number: int
) -> None:
    _, folder, _ = interrupted
    path = write_comparison(tmp_path, "losses")
    own = tmp_path / "losses"
    for pattern in (
        "experts/*/seed-0/metrics.jsonl",
        "cells/*/seed-0/metrics.jsonl",
        "cells/*/seed-1/metrics.jsonl",
    ):
        stopped(compare(path, "--json"), lambda p=pattern: any(own.glob(p)), number)
        wait_for_silence(own)
    finished(compare(path, "--json"))
    assert results(own)["rows"] == results(folder)["rows"]
    assert results(own)["missing"] == []


def wait_for_silence(folder: Path) -> None:
    """Until no process has the folder's runs any more: a killed comparison's cells save and stop."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if f"--config {folder}" not in listed:
            return
        time.sleep(0.2)
    raise AssertionError("a cell goes on without its comparison")


@pytest.mark.skipif(not LONG, reason="starts eight more cells; set DSMIXER_LONG=1")
def test_a_cell_that_fails_is_named_with_its_log_and_the_others_go_on(tmp_path: Path) -> None:
    path = write_comparison(tmp_path)
    values = json.loads(path.read_text())
    broken = tmp_path / "base"
    shutil.copytree(EMBEDDED / "base", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    values["comparison"]["variants"][1]["set"]["base.model"] = str(broken)
    values["comparison"]["seeds"] = [0]
    path.write_text(json.dumps(values))
    outcome, said = finished(compare(path, "--jobs", 2, "--json"), 1)
    hows = {
        entry["cell"].split("/")[0] + "/" + entry["cell"].split("/")[1]: entry["how"]
        for entry in outcome["cells"]
    }
    assert hows["cells/RSL"] == "done" and sorted(hows.values()).count("failed") == 1
    assert sorted(hows.values()).count("not run") == 2, (
        "the variant and the methods on the experts that failed"
    )
    assert "failed after" in said and "see " in said
    assert any("cells/no-loss" in name for name in results(tmp_path / "losses")["missing"])


@pytest.mark.skipif(not LONG, reason="starts a comparison under the launcher; set DSMIXER_LONG=1")
def test_cells_of_two_ranks_stop_and_go_on_as_well(tmp_path: Path) -> None:
    path = write_comparison(tmp_path)
    own = tmp_path / "losses"
    flags = ("--seeds", "0", "--only", "RSL", "--processes", 2, "--json")
    said = stopped(compare(path, *flags), lambda: any(own.glob("cells/*/seed-0/metrics.jsonl")))
    assert "stopped after" in said
    finished(compare(path, *flags))
    assert json.loads((own / "cells" / "RSL" / "seed-0" / "plan.json").read_text())["world_size"] == 2
