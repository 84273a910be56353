"""What a run does when a rank is stopped, killed, hangs, raises, or computes what is not a number.

The ranks are forked from one server (``support.forked``). The long form (``DSMIXER_LONG=1``) takes every ZeRO
stage, and the real launcher with its wrapper.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.comparing import RunRecord, same_bits
from support.forked import POLL_SECONDS, Job, RankServer
from support.launching import REPOSITORY, TIMEOUT_SECONDS, free_port, launch_environment
from support.tiny import write_recipe

pytestmark = pytest.mark.timeout(6 * TIMEOUT_SECONDS)

LONG = os.environ.get("DSMIXER_LONG") == "1"
HANG_SECONDS = 20
WITHIN_A_MINUTE = 60.0
SECRET_VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
SECRET = "hf_" + "Zq7" * 11


class Runs:
    """Runs of one recipe, each by its name."""

    def __init__(self, folder: Path, server: RankServer) -> None:
        self.folder, self.server = folder, server
        self.recipe = write_recipe(folder)

    def arguments(self, name: str, *more: str) -> list[str]:
        return ["--config", str(self.recipe), f"run.name={name}", *more]

    def start(self, name: str, *more: str, ranks: int = 2, fault: Mapping[str, Any] | None = None) -> Job:
        return self.server.start(self.arguments(name, *more), ranks=ranks, fault=fault)

    def run(
        self,
        name: str,
        *more: str,
        ranks: int = 2,
        fault: Mapping[str, Any] | None = None,
        as_launcher: bool = False,
    ) -> Job:
        return self.server.wait(self.start(name, *more, ranks=ranks, fault=fault), as_launcher=as_launcher)

    def record(self, name: str) -> RunRecord:
        return RunRecord(self.folder / "runs" / name)


def fault(kind: str, rank: int = 1, stage: int = 1, step: int = 5, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "rank": rank, "stage": stage, "step": step, **more}


def sent(number: signal.Signals, **more: Any) -> dict[str, Any]:
    return fault("signal", number=int(number), **more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRET_VARIABLES:
            patch.setenv(name, SECRET)
        with RankServer(folder) as server:
            yield Runs(folder, server)


@pytest.fixture(scope="module")
def waiting(runs: Runs) -> dict[str, Job]:
    """Jobs that end by a timeout, begun before everything else."""
    quick = f"health.hang_timeout={HANG_SECONDS}"
    return {
        "stopped": runs.start("stopped", quick, fault=sent(signal.SIGSTOP)),
        "hangs": runs.start("hangs", quick, fault=fault("hangs")),
        "zero": runs.start("zero", quick, fault=sent(signal.SIGSTOP, rank=0)),
    }


def test_a_signal_to_one_rank_of_four_makes_all_save_and_the_next_start_goes_on_bit_for_bit(
    waiting: dict[str, Job], runs: Runs
) -> None:
    """Step 5 is none that would be saved anyway."""
    fewer = "stage2.max_steps=3"
    alone = runs.run("alone", fewer, ranks=4)
    assert list(alone.codes.values()) == [0] * 4, alone.output[-4000:]
    signalled = runs.run("broken", fewer, ranks=4, fault=sent(signal.SIGTERM, rank=3))
    assert list(signalled.codes.values()) == [75] * 4, signalled.output[-4000:]
    assert "stopped after step 5 of stage 1, and saved; run the same command again" in signalled.output
    assert runs.record("broken").steps(1)[-1] == 5
    resumed = runs.run("broken", fewer, ranks=4)
    assert list(resumed.codes.values()) == [0] * 4, resumed.output[-4000:]
    same_bits(runs.record("broken"), runs.record("alone"))
    assert not holding_secrets(runs.folder), "what the environment holds stays there"


def holding_secrets(folder: Path) -> list[Path]:
    """Files of run folders and logs with the environment's secret in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_at_once_with_its_name(runs: Runs, rank: int) -> None:
    job = runs.run(f"killed{rank}", fault=sent(signal.SIGKILL, rank=rank))
    assert job.codes == {rank: -signal.SIGKILL, 1 - rank: 1}
    assert job.ended[1 - rank] - job.ended[rank] < WITHIN_A_MINUTE
    (line,) = job.lines("dsmixer: error")
    assert f"rank {rank} (" in line and f"pid {job.pids[rank]}) is gone" in line and "of stage 1" in line
    assert line.endswith(f"rank {1 - rank} ends with it")
    assert runs.record(f"killed{rank}").steps(1) == [3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_the_others_with_what_it_raised(runs: Runs, rank: int) -> None:
    job = runs.run(f"raises{rank}", fault=fault("raises", rank=rank))
    assert list(job.codes.values()) == [1, 1]
    (line,) = job.lines("dsmixer: error")
    told = (
        "failed in step 5 of stage 1 (reading its batch): OSError: the disk with the tokens of step 5 is gone"
    )
    assert f"rank {rank} (" in line and told in line and line.endswith(f"rank {1 - rank} ends with it")
    assert "Traceback" in job.output, "the rank that raised shows where"
    assert runs.record(f"raises{rank}").steps(1) == [3]


def test_a_step_that_is_not_a_number_stops_all_ranks_and_names_expert_and_examples(runs: Runs) -> None:
    job = runs.run("nan", fault=fault("nan", to=str(runs.folder)))
    assert list(job.codes.values()) == [1, 1]
    (line,) = job.lines("dsmixer: error")
    assert "step 5 of stage 1: the loss of this step is nan, the gradient is not finite for " in line
    assert (
        "the micro-batches with it held " in line and "sums.jsonl:" in line and "Nothing was updated" in line
    )
    assert "Traceback" not in job.output
    assert runs.record("nan").steps(1) == [3]


@pytest.mark.parametrize(
    ("zero_stage", "stage"),
    [(zero_stage, stage) for zero_stage in range(4) for stage in (1, 2)] if LONG else [(2, 1), (3, 2)],
)
def test_a_skipped_step_changes_no_bit_and_the_run_goes_on_as_if_it_had_not_been(
    runs: Runs, zero_stage: int, stage: int
) -> None:
    """Against a run whose loop leaves that step out; weights, moments, counts, usage."""
    key = f"{zero_stage}-{stage}"
    more = [f"deepspeed.zero_stage={zero_stage}", "health.on_nonfinite=skip"]
    skips = runs.start(f"skips{key}", *more, fault=fault("nan", stage=stage, step=4, to=str(runs.folder)))
    omits = runs.start(f"omits{key}", *more, fault=fault("omit", stage=stage, step=4))
    for job in (skips, omits):
        assert list(runs.server.wait(job).codes.values()) == [0, 0], job.output[-4000:]
    for rank in (0, 1):
        said = json.loads((runs.folder / f"rank-{rank}.json").read_text())
        assert said["skipped"] and said["same"] and said["tensors"] > 4
    assert "The step is skipped (1 of at most 10)" in skips.output
    ours, theirs = runs.record(f"skips{key}"), runs.record(f"omits{key}")
    skipped = [(row["stage"], row["step"]) for row in ours.rows if row["skipped"]]
    assert skipped == [(stage, 4)]
    theirs_rows = [row for row in theirs.rows if (row["stage"], row["step"]) != (stage, 4)]
    assert [row for row in ours.rows if not row["skipped"]] == theirs_rows
    for number in (1, 2):
        assert ours.unit_steps(number) == theirs.unit_steps(number)
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            mine, other = ours.tensors(number, kind), theirs.tensors(number, kind)
            assert all(mine[name].equal(tensor) for name, tensor in other.items()) and mine


def test_a_second_job_on_a_run_folder_is_refused_and_a_killed_one_leaves_it_free(runs: Runs) -> None:
    """The first is frozen with the lock in its hand."""
    first = runs.start("locked", "health.heartbeat=false", fault=fault("hangs"))
    until = runs.folder / "runs" / "locked" / "checkpoints" / "stage1" / "step-00000003"
    while not until.is_dir() and not first.codes:
        runs.server.look()
    second = runs.run("locked", as_launcher=True)
    assert 2 in second.codes.values(), second.output[-4000:]
    assert f"another job works in this run folder: pid {first.pids[0]} on " in second.output
    first.send(signal.SIGKILL)
    runs.server.wait(first)
    third = runs.run("locked")
    assert list(third.codes.values()) == [0, 0], third.output[-4000:]
    assert not (runs.folder / "runs" / "locked" / ".lock").exists()


def test_a_hung_rank_is_named_with_its_stack_and_ends_the_job(waiting: dict[str, Job], runs: Runs) -> None:
    job = runs.server.wait(waiting["hangs"])
    assert list(job.codes.values()) == [1, 1]
    lines = job.lines("dsmixer: error")
    assert len(lines) == 2
    for line in lines:
        assert f"rank 1 (" in line and f"pid {job.pids[1]}) hangs: no progress for 2" in line  # noqa: F541
        assert "in step 5 of stage 1 (reading its batch), and the others wait for it" in line
    assert "in hang_there" in job.output, "its stack"
    assert runs.record("hangs").steps(1) == [3]


@pytest.mark.parametrize(("name", "rank"), [("stopped", 1), ("zero", 0)])
def test_a_stopped_rank_is_named_and_ends_the_others(
    waiting: dict[str, Job], runs: Runs, name: str, rank: int
) -> None:
    job = waiting[name]
    while 1 - rank not in job.codes:
        runs.server.look()
    (line,) = job.lines("dsmixer: error")
    assert f"rank {rank} (" in line and f"pid {job.pids[rank]}) has given no sign of life for 2" in line
    job.send(signal.SIGKILL, [rank])  # as the launcher does 30 s after the others have ended
    runs.server.wait(job)
    assert job.codes[1 - rank] == 1
    assert runs.record(name).steps(1) == [3]


@pytest.mark.skipif(not LONG, reason="needs a launch of minutes; set DSMIXER_LONG=1")
def test_the_wrapper_hands_a_signal_to_the_ranks_and_starts_a_broken_run_again(tmp_path: Path) -> None:
    """Under the real launcher: a rank is killed, the run goes on; the wrapper is signalled, all save; 75."""
    recipe = write_recipe(tmp_path)
    log = tmp_path / "log"
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    command = [sys.executable, str(REPOSITORY / "launch" / "supervise.py"), "--pause", "1", "--"]
    command += [*launcher, "--master_port", str(free_port()), str(REPOSITORY / "launch" / "train.py")]
    command += ["--config", str(recipe), "run.name=wrapped", "stage1.max_steps=100000"]
    with log.open("wb") as output:
        wrapper = subprocess.Popen(
            command, env=launch_environment(), stdout=output, stderr=output, cwd=REPOSITORY
        )
    steps = tmp_path / "runs" / "wrapped" / "checkpoints" / "stage1"
    wait_for(lambda: any(steps.glob("step-*")), wrapper)
    pids = [
        int(line.split("pid ")[1].split(",")[0]) for line in log.read_text().splitlines() if "pid " in line
    ]
    os.kill(pids[1], signal.SIGKILL)
    wait_for(lambda: "goes on after step" in log.read_text(), wrapper)
    wrapper.send_signal(signal.SIGTERM)
    assert wrapper.wait(TIMEOUT_SECONDS) == 75, log.read_text()[-4000:]
    text = log.read_text()
    assert "restart 1 of 3 in 1 s" in text and "told 2 ranks to save and stop" in text
    assert "stopped after step" in text


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, "the wrapper has ended"
        time.sleep(POLL_SECONDS)
