"""``dsmixer train --profile``: the run is the same to the last bit, and the parts of a step add up to it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from support.comparing import RunRecord, same_bits
from support.forked import RankServer
from support.launching import TIMEOUT_SECONDS, launch_environment
from support.tiny import write_recipe

from dsmixer.cli.main import build_parser
from dsmixer.report.profile_table import profile_table
from dsmixer.training.profile.clock import PARTS, Clock
from dsmixer.training.profile.steps import ProfileRequest, StageProfile, TimedStep, summary

pytestmark = pytest.mark.timeout(4 * TIMEOUT_SECONDS)
LONG = os.environ.get("DSMIXER_LONG") == "1"


KINDS: dict[str, list[str]] = {"plain": [], "profiled": ["--profile=1", "--profile-trace"]}
BOTH = (
    "import sys, json; from dsmixer.cli.train import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"
)


def arguments(recipe: Path, *overrides: str) -> list[list[str]]:
    """Of a run, and of the same with a profile."""
    start = ["--config", str(recipe), *overrides]
    return [[*start, f"run.name={kind}", *more] for kind, more in KINDS.items()]


def records(folder: Path) -> list[RunRecord]:
    return [RunRecord(folder / "runs" / kind) for kind in KINDS]


def profile_of(record: RunRecord) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((record.folder / "profile.json").read_text())["stages"]
    return found


def check_sums(of_stage: dict[str, Any]) -> None:
    """Parts, which the clock adds up, against the wall time around the step, which it has no part in."""
    for step in of_stage["steps"]:
        assert set(step) == {"step", "wall_seconds", *PARTS}
    parts = of_stage["parts"]
    wall = of_stage["wall_seconds"] - of_stage["profiling_seconds"]
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(wall, rel=0.01)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0)


def test_a_profiled_run_is_the_run_itself_and_says_where_its_steps_spend_their_time(tmp_path: Path) -> None:
    # the first step is left out, and only stage two has one for a trace; the last step of each saves
    few = ("stage1.max_steps=2", "stage2.max_steps=3", "mixer.dropout=0.1", "deepspeed.zero_stage=2")
    given = json.dumps(arguments(write_recipe(tmp_path), *few))
    environment = launch_environment()
    job = subprocess.run([sys.executable, "-c", BOTH, given], env=environment, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr[-4000:]
    (plain, profiled), output = records(tmp_path), job.stdout
    same_bits(plain, profiled)
    found = profile_of(profiled)
    assert set(found) == {"1", "2"}
    for stage, of_stage in found.items():
        check_sums(of_stage)
        assert of_stage["ranks"] == 1 and [step["step"] for step in of_stage["steps"]] == [2]
        assert all(part["seconds"] > 0 for part in of_stage["parts"].values())
        assert of_stage["parts"]["mixers"]["calls"] == 8 * 8  # projections, micro-batches of one row
        # the waiting for the batch, once a step, and the way of each micro-batch to the device
        assert of_stage["parts"]["data"]["calls"] == 1 + 8
        assert f"profile of stage {stage}: step 2" in output
    assert found["1"]["saving_seconds"] > 0 == found["2"]["saving_seconds"]
    assert traced_parts(profiled.folder / "trace-stage2.json.gz") == {*PARTS, "saving", "profiling"}
    assert not (profiled.folder / "trace-stage1.json.gz").exists()
    assert not (plain.folder / "profile.json").exists()


def traced_parts(file: Path) -> set[str]:
    with gzip.open(file) as text:
        events = json.load(text)["traceEvents"]
    names = {str(event.get("name")) for event in events}
    return {name.removeprefix("dsmixer: ") for name in names if name.startswith("dsmixer: ")}


@pytest.mark.skipif(not LONG, reason="long: DSMIXER_LONG=1")
@pytest.mark.parametrize(
    ("mode", "zero"), [("replicate", 1), ("weights", 3), ("tokens", 1), ("tokens", 2), ("tokens", 3)]
)
def test_two_ranks_in_every_placement(tmp_path: Path, mode: str, zero: int) -> None:
    layout = (f"placement.mode={mode}", f"deepspeed.zero_stage={zero}", "base.activation_checkpointing=true")
    with RankServer(tmp_path) as server:
        jobs = [server.run(given, ranks=2) for given in arguments(write_recipe(tmp_path), *layout)]
    for job in jobs:
        assert set(job.codes.values()) == {0}, job.output[-4000:]
    (plain, profiled), output = records(tmp_path), jobs[-1].output
    same_bits(plain, profiled)
    for of_stage in profile_of(profiled).values():
        check_sums(of_stage)
        assert len(of_stage["by_rank"]) == 2 and of_stage["parts"]["exchange"]["seconds"] > 0
    assert "most (rank)" in output


def test_a_part_inside_another_is_taken_off_it_and_saving_is_closed() -> None:
    at = [0.0]
    clock = Clock(torch.device("cpu"), lambda: at[0])

    def wait(seconds: float) -> None:
        at[0] += seconds

    clock.start()
    wait(1)
    mixers = clock.enter("mixers")
    wait(2)
    router = clock.enter("router")
    wait(4)
    again = clock.enter("router")
    wait(8)
    clock.leave(again)
    clock.leave(router)
    wait(16)
    clock.leave(mixers)
    saving = clock.enter("saving")
    inside = clock.enter("exchange")
    wait(32)
    clock.leave(inside)
    clock.leave(saving)
    wait(64)
    seconds, calls = clock.stop()
    assert seconds == {"loop": 65, "mixers": 18, "router": 12, "saving": 32}
    assert calls == {"mixers": 1, "router": 1, "saving": 1}


@pytest.mark.parametrize(
    ("num_steps", "first", "asked", "trace", "timed", "traced"),
    [
        (100, 0, 20, False, range(3, 23), range(23, 23)),
        (100, 50, 20, True, range(53, 73), range(73, 75)),
        (6, 0, 20, True, range(3, 4), range(4, 6)),
        (1, 0, 20, False, range(0, 1), range(1, 1)),
        (1, 0, 20, True, range(0, 1), range(1, 1)),
        (3, 0, 20, False, range(1, 3), range(3, 3)),
        (100, 0, 0, False, range(3, 3), range(3, 3)),
    ],
)
def test_the_first_steps_of_a_start_are_left_out_as_far_as_there_are_others(
    num_steps: int, first: int, asked: int, trace: bool, timed: range, traced: range
) -> None:
    loop: Any = SimpleNamespace(
        stage=SimpleNamespace(num_steps=num_steps), world=SimpleNamespace(device=torch.device("cpu"))
    )
    profile = StageProfile(ProfileRequest(asked, trace), loop, first, Path(), (loop, "", ""))
    assert (list(profile.timed), list(profile.traced)) == (list(timed), list(traced))


def test_the_table_has_shares_of_the_whole_and_the_ranks_that_stand_out() -> None:
    steps = [
        TimedStep(4, 10.0, {"base": 6.0, "mixers": 2.0, "loop": 1.0, "saving": 1.0}, {"mixers": 4}),
        TimedStep(5, 10.0, {"base": 9.0, "loop": 1.0}, {"mixers": 6}),
    ]
    found = {"first_step": 4, "last_step": 5, "ranks": 2, "device": "cpu", "zero_stage": 1, **summary(steps)}
    even = dict.fromkeys(("seconds", *PARTS), 1.0)
    found["by_rank"] = [even, {**even, "mixers": 0.25, "exchange": 3.0}]
    console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(profile_table(2, found))
    lines = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if "│" in line}
    assert "75.0 %" in lines["base"] and "7.5" in lines["base"]
    assert "15.0 %" in lines["loop"]
    cells = [cell.strip() for cell in lines["mixers"].split("│")]
    assert cells[2:8] == ["1", "1", "10.0 %", "5", "0.25 (1)", "1 (0)"]
    assert "3 (1)" in lines["exchange"]


def test_an_override_after_the_flag_is_told_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    assert parser.parse_args(["train", "--config", "r.yaml", "--profile"]).profile == 20
    assert parser.parse_args(["train", "--config", "r.yaml", "--profile", "7"]).profile == 7
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["train", "--config", "r.yaml", "--profile", "run.seed=1"])
    assert stopped.value.code == 2
    assert "'run.seed=1' is no number of steps" in capsys.readouterr().err
