"""A very small round of the bench: the systems do the same work where they should, and all of it is work."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.launching import REPOSITORY, launch_environment

LONG = os.environ.get("DSMIXER_LONG") == "1"
Rows = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Of all systems in one process, by kind of work and system."""
    script = Path(__file__).with_name("one_process.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=REPOSITORY,
        env=launch_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["case"]["what"], row["system"]): row for row in found}


def test_every_system_is_measured(rows: Rows) -> None:
    trained = {"base", "lora", "loop", "stage_one", "stage_two"}
    assert {name for what, name in rows if what == "train"} == trained
    assert {name for what, name in rows if what == "decode"} == trained - {"stage_one"}
    for row in rows.values():
        assert row["problem"] is None
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["to_lora"]["median"] > 0 and row["to_base"]["median"] > 0 and row["tokens_per_second"] > 0
    assert rows["train", "lora"]["to_lora"]["median"] == rows["train", "base"]["to_base"]["median"] == 1.0


def test_losses_are_those_of_the_vocabulary_and_what_trains_has_gradients(rows: Rows) -> None:
    for (what, name), row in rows.items():
        if what == "train":
            # random weights: every one of the 128 tokens is about as likely
            assert row["loss"] == pytest.approx(math.log(128), rel=0.05)
            assert row["gradient_norm"] > 1e-3
            assert (row["trained"] > 0) == (name != "base")


def test_stage_one_on_one_domain_is_one_peft_lora(rows: Rows) -> None:
    """All tokens of the first step are the first expert's, which is the adapter that PEFT was given."""
    ours, peft = rows["train", "stage_one"], rows["train", "lora"]
    assert ours["loss"] == pytest.approx(peft["loss"], rel=1e-5)
    assert ours["gradient_norm"] == pytest.approx(peft["gradient_norm"], rel=1e-4)


def test_stage_two_and_the_plain_loop_compute_the_same(rows: Rows) -> None:
    """Same experts, routers and choice; the routing loss has not begun at the first step."""
    ours, loop = rows["train", "stage_two"], rows["train", "loop"]
    assert ours["loss"] == pytest.approx(loop["loss"], rel=1e-5)
    assert ours["gradient_norm"] == pytest.approx(loop["gradient_norm"], rel=1e-3)
    assert ours["trained"] == loop["trained"]
    assert ours["loss"] != pytest.approx(rows["train", "base"]["loss"], rel=1e-5)


@pytest.mark.skipif(not LONG, reason="every system in a process of its own: DSMIXER_LONG=1")
def test_the_command_measures_and_leaves_its_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "--short", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=launch_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["system"] for row in rows} >= {"base", "lora", "x_lora", "arrow", "loop", "stage_two"}
    assert all(row["problem"] is None for row in rows)
    assert "PEFT LoRA" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "ratios.svg").read_text().count("<svg") == 1
