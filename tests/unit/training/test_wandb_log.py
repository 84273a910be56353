"""Weights & Biases as it is, offline: what its files hold after a run, read by its own messages.

These are part of the long form (DSMIXER_LONG=1), where the extra ``wandb`` is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.launching import REPOSITORY, launch, launch_environment
from support.tiny import write_recipe

from dsmixer.config.errors import UserError
from dsmixer.config.recipe import load_recipe
from dsmixer.training.wandb_log import check_wandb

LONG = os.environ.get("DSMIXER_LONG") == "1" and importlib.util.find_spec("wandb") is not None
IS_LONG = pytest.mark.skipif(not LONG, reason="set DSMIXER_LONG=1, with the extra wandb installed")
HEADER, PIECE = 7, struct.Struct("<IHB")
KEY = "0123456789abcdef" * 2 + "01234567"


def records(folder: Path) -> Iterator[Any]:
    """What Weights & Biases has written for one of its runs: pieces of checksum, length, kind and message."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data = path.read_bytes()
    assert len(data) < 32768, "one block, in which no message is cut"
    place = HEADER
    while place < len(data):
        _, length, _ = PIECE.unpack_from(data, place)
        place += PIECE.size
        yield Record.FromString(data[place : place + length])
        place += length


def rows_of(folder: Path, stage: int) -> list[dict[str, float]]:
    """The logged steps, without what Weights & Biases puts to them."""
    found = []
    for record in records(folder):
        if record.HasField("history"):
            items = {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
            }
            own = {key: value for key, value in items.items() if key.startswith(f"stage{stage}/")}
            found.append({"step": items["_step"], **own})
    return found


def run_record(folder: Path) -> Any:
    return next(record.run for record in records(folder) if record.HasField("run"))


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def recipe_with(folder: Path, *overrides: str) -> Any:
    return load_recipe(write_recipe(folder), overrides)


def test_a_project_needs_the_package_and_none_needs_nothing(tmp_path, monkeypatch) -> None:
    check_wandb(recipe_with(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_wandb(recipe_with(tmp_path))
    with pytest.raises(UserError, match="not installed") as found:
        check_wandb(recipe_with(tmp_path, "run.wandb=experiments"))
    assert "[wandb]" in str(found.value)


LOG_ONE_ROW = """
import sys
from pathlib import Path
from dsmixer.training.wandb_log import WandbLog
log = WandbLog(Path("."), project="experiments", name="law", stage=2)
step = int(sys.argv[1])
log.write(step, {"stage": 2, "step": step, "loss": 0.5 * step, "rsl": None, "grad_norm": float("inf")})
log.close()
"""


def log_one_row(folder: Path, step: int, **variables: str) -> str:
    """In a process with these variables and no others of Weights & Biases; what it says on standard error."""
    kept = {name: value for name, value in launch_environment().items() if not name.startswith("WANDB_")}
    environment = {**kept, "HOME": str(folder), "NETRC": str(folder / "netrc"), **variables}
    command = [sys.executable, "-c", LOG_ONE_ROW, str(step)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stderr


@IS_LONG
def test_rows_of_a_stage_and_of_the_start_after_it_are_of_one_run_and_hold_no_key(tmp_path) -> None:
    for step in (1, 2):
        log_one_row(tmp_path, step, WANDB_MODE="offline", WANDB_API_KEY=KEY)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [rows_of(folder, 2) for folder in folders] == [
        [{"step": 1, "stage2/loss": 0.5}],
        [{"step": 2, "stage2/loss": 1.0}],
    ]
    first, second = (run_record(folder) for folder in folders)
    assert first.run_id == second.run_id and first.run_id.endswith("-stage2")
    assert (first.project, first.display_name, first.run_group) == ("experiments", "law stage 2", "law")
    assert KEY.encode() not in all_bytes(tmp_path)


@IS_LONG
def test_without_a_key_a_run_is_told_once_and_goes_on(tmp_path) -> None:
    told = log_one_row(tmp_path, 1)
    assert told.count("nothing more of stage 2 goes to Weights & Biases: No API key") == 1


@IS_LONG
def test_a_run_on_two_ranks_sends_the_rows_of_its_metrics_once_and_nothing_of_its_recipe(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = write_recipe(tmp_path)
    arguments = ["--config", str(recipe), "run.name=law", "run.wandb=experiments"]
    launch(REPOSITORY / "launch" / "train.py", arguments, ranks=2).check()
    run = tmp_path / "runs" / "law"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert [run_record(folder).display_name for folder in folders] == ["law stage 1", "law stage 2"]
    for stage, folder in enumerate(folders, start=1):
        own = [row for row in metrics if row["stage"] == stage]
        expected = [
            {"step": row["step"]}
            | {f"stage{stage}/{k}": v for k, v in row.items() if k not in ("stage", "step") and v is not None}
            for row in own
        ]
        assert rows_of(folder, stage) == expected
    sent = all_bytes(run / "wandb")
    assert b"train.jsonl" not in sent and b"launch/train.py" not in sent
