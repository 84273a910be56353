"""What a run does when a rank is stopped, killed, hangs, raises, or computes what is not a number, in a step.

The ranks are forked from one server (``support.forked``). Of every fault the message, the time until the
ranks have ended, their codes and what is left are looked at; ``pytest -s`` prints a table. The long form
(``DSMIXER_LONG=1``) takes every ZeRO stage.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.comparing import same_bits
from support.fault_runs import Runs, save_seconds, seconds_after
from support.forked import Job
from support.launching import TIMEOUT_SECONDS

pytestmark = pytest.mark.timeout(6 * TIMEOUT_SECONDS)

LONG = os.environ.get("DSMIXER_LONG") == "1"
HANG_SECONDS = 20
WITHIN_A_MINUTE = 60.0
END_SECONDS = 10.0
"""For four Python processes on two cores to come to their ends, beside other jobs."""


def fault(kind: str, rank: int = 1, stage: int = 1, step: int = 5, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "rank": rank, "stage": stage, "step": step, **more}


def sent(number: signal.Signals, **more: Any) -> dict[str, Any]:
    return fault("signal", number=int(number), **more)


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
    waiting: dict[str, Job], runs: Runs, secret: str
) -> None:
    """Step 5 is none that would be saved anyway."""
    fewer = "stage2.max_steps=3"
    alone = runs.run("alone", fewer, ranks=4)
    assert list(alone.codes.values()) == [0] * 4, alone.output[-4000:]
    signalled = runs.run("broken", fewer, ranks=4, fault=sent(signal.SIGTERM, rank=3))
    assert list(signalled.codes.values()) == [75] * 4, signalled.output[-4000:]
    assert "stopped after step 5 of stage 1, and saved; run the same command again" in signalled.output
    assert runs.record("broken").steps(1)[-1] == 5
    step, save = max(runs.step_seconds("broken")), max(save_seconds(signalled))
    last = max(seconds_after(signalled).values())
    print(
        f"\nfrom SIGTERM to one rank of four to the last exit: {last:.2f} s; the longest step of this run "
        f"took {step:.2f} s, the longest save {save:.2f} s"
    )
    assert last <= step + save + END_SECONDS
    runs.tell("SIGTERM to rank 3 of 4 in step 5", signalled, runs.record("broken"))
    resumed = runs.run("broken", fewer, ranks=4)
    assert list(resumed.codes.values()) == [0] * 4, resumed.output[-4000:]
    same_bits(runs.record("broken"), runs.record("alone"))
    assert not holding(secret, runs.folder), "what the environment holds stays there"


def holding(secret: str, folder: Path) -> list[Path]:
    """Files of run folders and logs with the environment's secret in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_at_once_with_its_name(runs: Runs, rank: int) -> None:
    job = runs.run(f"killed{rank}", fault=sent(signal.SIGKILL, rank=rank))
    assert job.codes == {rank: -signal.SIGKILL, 1 - rank: 1}
    assert seconds_after(job)[1 - rank] < WITHIN_A_MINUTE
    (line,) = job.lines("dsmixer: error")
    assert f"rank {rank} (" in line and f"pid {job.pids[rank]}) is gone" in line and "of stage 1" in line
    assert line.endswith(f"rank {1 - rank} ends with it")
    assert "killed or crashed" in line and '"Out of memory" in the kernel\'s log' in line
    assert runs.record(f"killed{rank}").steps(1) == [3]
    runs.tell(f"SIGKILL of rank {rank}", job, runs.record(f"killed{rank}"))


def test_a_rank_that_raises_ends_the_others_with_what_it_raised(runs: Runs) -> None:
    jobs = [runs.start(f"raises{rank}", fault=fault("raises", rank=rank)) for rank in (0, 1)]
    for rank, job in enumerate(jobs):
        assert list(runs.server.wait(job).codes.values()) == [1, 1]
        (line,) = job.lines("dsmixer: error")
        told = "failed in step 5 of stage 1 (reading its batch): OSError: the disk with the tokens of step 5"
        assert f"rank {rank} (" in line and told in line and line.endswith(f"rank {1 - rank} ends with it")
        assert "Traceback" in job.output, "the rank that raised shows where"
        assert max(seconds_after(job).values()) < WITHIN_A_MINUTE
        assert runs.record(f"raises{rank}").steps(1) == [3]
        runs.tell(f"rank {rank} raises in its data loader", job, runs.record(f"raises{rank}"))


def test_a_step_that_is_not_a_number_stops_all_ranks_and_names_expert_and_examples(runs: Runs) -> None:
    job = runs.run("nan", fault=fault("nan", to=str(runs.folder)))
    assert list(job.codes.values()) == [1, 1]
    (line,) = job.lines("dsmixer: error")
    assert "step 5 of stage 1: the loss of this step is nan, the gradient is not finite for " in line
    assert (
        "the micro-batches with it held " in line and "sums.jsonl:" in line and "Nothing was updated" in line
    )
    assert "Traceback" not in job.output
    assert max(seconds_after(job).values()) < WITHIN_A_MINUTE
    assert runs.record("nan").steps(1) == [3]
    runs.tell("a loss that is not a number on rank 1", job, runs.record("nan"))


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


def test_skipped_steps_are_counted_over_the_starts_of_a_run(runs: Runs) -> None:
    """Also where the step is none that is logged."""
    more = ("health.on_nonfinite=skip", "health.max_skipped=1", "run.log_every=5")
    first = runs.run("counted", *more, "--stages", "1", fault=fault("nan", step=2, to=str(runs.folder)))
    assert list(first.codes.values()) == [0, 0], first.output[-4000:]
    assert "The step is skipped (1 of at most 1)" in first.output
    second = runs.run("counted", *more, fault=fault("nan", stage=2, step=2, to=str(runs.folder)))
    assert list(second.codes.values()) == [1, 1], second.output[-4000:]
    assert "1 such steps of the run were skipped before" in second.output


def test_a_second_job_on_a_run_folder_is_refused_and_a_killed_one_leaves_it_free(runs: Runs) -> None:
    """The first is frozen with the lock in its hand."""
    first = runs.start("locked", "health.heartbeat=false", fault=fault("hangs"))
    until = runs.folder / "runs" / "locked" / "checkpoints" / "stage1" / "step-00000003"
    while not until.is_dir() and not first.codes:
        runs.server.look()
    second = runs.run("locked", as_launcher=True)
    assert list(second.codes.values()) == [2, 2], second.output[-4000:]
    assert second.output.count("dsmixer: ") == 1, "all ranks say the same, once"
    assert f"another job works in this run folder: pid {first.pids[0]} on " in second.output
    first.send(signal.SIGKILL)
    runs.server.wait(first)
    third = runs.run("locked", "--stages", "1")
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
    assert HANG_SECONDS <= min(seconds_after(job).values()) <= 2 * HANG_SECONDS
    assert runs.record("hangs").steps(1) == [3]
    runs.tell(f"rank 1 hangs (hang_timeout {HANG_SECONDS})", job, runs.record("hangs"))


@pytest.mark.parametrize(("name", "rank"), [("stopped", 1), ("zero", 0)])
def test_a_stopped_rank_is_named_and_ends_the_others(
    waiting: dict[str, Job], runs: Runs, name: str, rank: int
) -> None:
    job = waiting[name]
    while 1 - rank not in job.codes:
        runs.server.look()
    (line,) = job.lines("dsmixer: error")
    assert f"rank {rank} (" in line and f"pid {job.pids[rank]}) has given no sign of life for 2" in line
    # the last word of a rank that was stopped soon after a save may be that it saves
    assert seconds_after(job)[1 - rank] <= 2 * HANG_SECONDS
    assert job.codes[1 - rank] == 1 and runs.record(name).steps(1) == [3]
    runs.tell(f"SIGSTOP of rank {rank} (hang_timeout {HANG_SECONDS})", job, runs.record(name))
    job.send(signal.SIGKILL, [rank])  # as the launcher does 30 s after the others have ended
    runs.server.wait(job)


def test_the_next_start_of_every_broken_run_goes_on_from_its_last_checkpoint(runs: Runs) -> None:
    names = ["killed0", "killed1", "raises0", "raises1", "nan", "stopped", "zero", "hangs"]
    jobs = {name: runs.start(name, "--stages", "1") for name in (names if LONG else names[1::2])}
    for name, job in jobs.items():
        assert list(runs.server.wait(job).codes.values()) == [0, 0], job.output[-4000:]
        assert "stage 1 goes on after step 3 of 6" in job.output and runs.record(name).steps(1) == [3, 6]
