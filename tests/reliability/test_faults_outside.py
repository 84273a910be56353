"""What a run does when something goes wrong outside the loop: on one rank alone, on a disk, at its ends.

The first tests begin jobs that wait for others. The table of ``pytest -s`` goes on here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fault_runs import Runs, seconds_after
from support.forked import POLL_SECONDS, Job
from support.launching import REPOSITORY, TIMEOUT_SECONDS, free_port, launch_environment
from support.small_disk import small_disk
from support.tiny import write_recipe

pytestmark = pytest.mark.timeout(6 * TIMEOUT_SECONDS)

LONG = os.environ.get("DSMIXER_LONG") == "1"
WITHIN_A_MINUTE = 60.0
FEW = ("stage1.max_steps=2", "stage2.max_steps=1")
BAD_RECORD = '{"prompt": "no completion here", "note": "5"}\n'


def at(place: str, does: str, rank: int = 0, **more: Any) -> dict[str, Any]:
    return {"kind": "place", "place": place, "does": does, "rank": rank, **more}


def sent(place: str, number: signal.Signals, rank: int) -> dict[str, Any]:
    return at(place, "signal", rank, number=int(number))


@pytest.fixture(scope="module")
def alone(runs: Runs) -> dict[str, Job]:
    """Jobs in which one rank leaves, begun together: the others wait a few seconds for it."""
    bad = runs.folder / "bad.jsonl"
    bad.write_text(BAD_RECORD)
    evaluated = arguments_of(runs, "evaluating")
    saving_last = at("saving", "signal", 1, time=2, number=int(signal.SIGTERM))
    jobs = {
        "bad file 1": runs.start("bad-file-1", *FEW, fault=at("reading", "reads", 1, to=str(bad))),
        "publishing": runs.start("publishing", *FEW, fault=sent("publishing", signal.SIGTERM, 0)),
        "evaluating": runs.start("evaluating", *evaluated, fault=sent("evaluating", signal.SIGTERM, 1)),
        "finding": runs.start("not-begun", *FEW, fault=sent("finding", signal.SIGTERM, 0)),
        "last save": runs.start("last-save", *FEW, fault=saving_last),
        "reading": runs.start("not-read", *FEW, fault=sent("reading", signal.SIGTERM, 1)),
        "muted": runs.start("muted", *FEW, fault=at("reading", "mutes")),
        "broken disk": runs.start("broken-disk", *FEW, fault=at("settling", "breaks")),
    }
    if LONG:
        jobs["bad file 0"] = runs.start("bad-file-0", *FEW, fault=at("reading", "reads", 0, to=str(bad)))
    for name in ("bad file 1", "broken disk"):  # ranks above 0 wait a while for the launcher, to be silent
        runs.server.wait(jobs[name], as_launcher=True)
    return {name: runs.server.wait(job) for name, job in jobs.items()}


@pytest.mark.parametrize("rank", [0, 1] if LONG else [1])
def test_a_file_that_is_bad_on_one_rank_alone_ends_the_others_with_what_that_rank_says(
    alone: dict[str, Job], runs: Runs, rank: int
) -> None:
    job = alone[f"bad file {rank}"]
    assert job.codes == {rank: 2, 1 - rank: 1}, job.output[-4000:]
    told = [line for line in job.lines(f"rank {rank} (") if "left alone" in line]
    assert len(told) == 1 and told[0].endswith(f"rank {1 - rank} ends with it")
    assert "outside the training loop (setting up): " in told[0] and "bad.jsonl:1" in told[0]
    assert "Fix: " in told[0] and "Traceback" not in job.output
    assert seconds_after(job)[1 - rank] < WITHIN_A_MINUTE
    runs.tell(f"a data file that is bad on rank {rank} alone", job, runs.record(f"bad-file-{rank}"))


@pytest.mark.parametrize(("name", "rank"), [("publishing", 0), ("evaluating", 1)])
def test_a_signal_to_one_rank_after_training_ends_all_with_75_and_the_next_start_finishes(
    alone: dict[str, Job], runs: Runs, name: str, rank: int
) -> None:
    job = alone[name]
    assert list(job.codes.values()) == [75, 75], job.output[-4000:]
    (line,) = [line for line in job.lines(f"rank {rank} (") if "was stopped by a signal" in line]
    assert f"({name}): stopped after training; everything trained is saved" in line and "error" not in line
    assert seconds_after(job)[1 - rank] < WITHIN_A_MINUTE and "Traceback" not in job.output
    record = runs.record(name)
    assert record.steps(2) == [1]
    runs.tell(f"SIGTERM to rank {rank} while {name}", job, record)
    if name == "evaluating" and not LONG:
        return
    resumed = runs.run(name, *arguments_of(runs, name))
    assert list(resumed.codes.values()) == [0, 0], resumed.output[-4000:]
    assert (record.folder / "mixture" / "mixer_config.json").is_file()


def test_a_signal_before_training_ends_all_with_75_and_leaves_nothing(
    alone: dict[str, Job], runs: Runs
) -> None:
    job = alone["finding"]
    assert list(job.codes.values()) == [75, 75], job.output[-4000:]
    assert "dsmixer: stopped before training; run the same command again to go on" in job.output
    assert len(job.lines("rank 1 ends with it")) == 1 and "Traceback" not in job.output
    record = runs.record("not-begun")
    assert not record.folder.exists()
    runs.tell("SIGTERM to rank 0 before anything is read", job, record)


def test_a_signal_while_a_rank_reads_its_data_ends_all_with_75_before_anything_is_begun(
    alone: dict[str, Job], runs: Runs
) -> None:
    job = alone["reading"]
    assert list(job.codes.values()) == [75, 75], job.output[-4000:]
    (line,) = [line for line in job.lines("rank 1 (") if "was stopped by a signal" in line]
    assert "(setting up): stopped before training" in line and "Traceback" not in job.output
    assert not runs.record("not-read").folder.exists()


def test_a_signal_in_the_last_save_is_not_forgotten(alone: dict[str, Job], runs: Runs) -> None:
    job = alone["last save"]
    assert list(job.codes.values()) == [75, 75], job.output[-4000:]
    assert "dsmixer: stopped after training; everything trained is saved; run the same" in job.output
    record = runs.record("last-save")
    assert record.steps(2) == [1] and not (record.folder / "mixture").exists()


def test_a_log_that_takes_no_line_ends_no_run(alone: dict[str, Job], runs: Runs) -> None:
    job = alone["muted"]
    assert list(job.codes.values()) == [0, 0], job.output[-4000:]
    record = runs.record("muted")
    assert record.steps(2) == [1] and (record.folder / "mixture" / "mixer_config.json").is_file()


def arguments_of(runs: Runs, name: str) -> list[str]:
    tested = ["evaluation.enabled=true", f"data.domains.0.test={runs.folder / 'data' / 'words.jsonl'}"]
    return [*FEW, *tested] if name == "evaluating" else list(FEW)


def test_a_disk_that_does_not_answer_is_no_wrong_input(alone: dict[str, Job], runs: Runs) -> None:
    job = alone["broken disk"]
    assert list(job.codes.values()) == [1, 1], job.output[-4000:]
    (line,) = [line for line in job.lines("dsmixer: error") if "alone" not in line]
    assert line.endswith("plan.json: Input/output error") and "Traceback" not in job.output
    assert "Fix: look at the disk or the file system there, and run the same command again" in job.output
    runs.tell("the disk of the run folder does not answer (EIO) on rank 0", job, runs.record("broken-disk"))


def test_a_rank_killed_while_checkpoints_are_verified_is_named_and_the_next_start_goes_on(runs: Runs) -> None:
    begun = runs.run("verified", *FEW, "--stages", "1")
    assert list(begun.codes.values()) == [0, 0], begun.output[-4000:]
    job = runs.run("verified", *FEW, fault=sent("verifying", signal.SIGKILL, 1))
    assert job.codes == {0: 1, 1: -signal.SIGKILL}, job.output[-4000:]
    (line,) = job.lines("dsmixer: error")
    assert f"pid {job.pids[1]}) is gone, last heard outside the training loop (" in line
    assert seconds_after(job)[0] < WITHIN_A_MINUTE
    runs.tell("SIGKILL of rank 1 while checkpoints are verified", job, runs.record("verified"))
    resumed = runs.run("verified", *FEW)
    assert list(resumed.codes.values()) == [0, 0], resumed.output[-4000:]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    with small_disk(tmp_path / "disk", "4m") as folder:
        yield folder


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fills_up_under_one_rank_s_save_leaves_what_was_saved_and_ends_with_1(
    runs: Runs, disk: Path, rank: int
) -> None:
    """In the second of three saves; the run goes on to the end of the stage, which can't be saved either."""
    more = (f"run.dir={disk}", "checkpoint.every=2", "stage2.enabled=false")
    job = runs.run("full", *more, fault=at("saving", "fills", rank, time=2, to=str(disk)))
    record = type(runs.record("full"))(disk / "full")
    assert list(job.codes.values()) == [1, 1], job.output[-4000:]
    (warning,) = job.lines("dsmixer: warning: step 4 of stage 1 could not be saved")
    assert "No space left on device (" in warning and str(disk) in warning
    assert f"rank {rank})" in warning and f"rank {1 - rank})" not in warning
    (line,) = job.lines("dsmixer: error")
    assert "step 6 of stage 1 could not be saved: " in line and "step-00000002 is whole; make room" in line
    assert record.steps(1) == [2] and not list(record.folder.glob("checkpoints/*/.*"))
    assert "Traceback" not in job.output and max(seconds_after(job).values()) < WITHIN_A_MINUTE
    runs.tell(f"the disk fills up under rank {rank}'s part of a save", job, record)
    (disk / "filler").unlink()
    resumed = runs.run("full", *more)
    assert list(resumed.codes.values()) == [0, 0], resumed.output[-4000:]
    assert "stage 1 goes on after step 2 of 6" in resumed.output


def test_a_disk_that_is_full_when_the_mixture_is_published_is_no_wrong_input(runs: Runs, disk: Path) -> None:
    more = (f"run.dir={disk}", *FEW)
    job = runs.start("unpublished", *more, fault=at("publishing", "fills", to=str(disk)))
    runs.server.wait(job, as_launcher=True)
    assert list(job.codes.values()) == [1, 1], job.output[-4000:]
    assert job.output.count("No space left on device") == 1 and "Traceback" not in job.output
    assert "make room, or make the folder writable, and run the same command again" in job.output
    record = type(runs.record("full"))(disk / "unpublished")
    assert record.steps(2) == [1] and not (record.folder / "mixture" / "mixer_config.json").exists()
    runs.tell("the disk is full when the mixture is published", job, record)
    (disk / "filler").unlink()
    resumed = runs.run("unpublished", *more)
    assert list(resumed.codes.values()) == [0, 0], resumed.output[-4000:]
    assert (record.folder / "mixture" / "mixer_config.json").is_file()


@pytest.mark.skipif(not LONG, reason="starts the whole program twice under the launcher; set DSMIXER_LONG=1")
def test_the_wrapper_hands_a_signal_to_the_ranks_and_starts_a_broken_run_again(tmp_path: Path) -> None:
    """Under the real launcher: a rank is killed, the run goes on; the wrapper is signalled, all save; 75."""
    recipe = write_recipe(tmp_path)
    log = tmp_path / "log"
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    command = [sys.executable, str(REPOSITORY / "launch" / "supervise.py"), "--pause", "1", "--"]
    command += [*launcher, "--master_port", str(free_port()), str(REPOSITORY / "launch" / "train.py")]
    command += ["--config", str(recipe), "run.name=wrapped", "stage1.max_steps=100000"]
    began = time.monotonic()
    with log.open("wb") as output:
        wrapper = subprocess.Popen(
            command, env=launch_environment(), stdout=output, stderr=output, cwd=REPOSITORY
        )
    steps = tmp_path / "runs" / "wrapped" / "checkpoints" / "stage1"
    wait_for(lambda: any(steps.glob("step-*")), wrapper)
    pids = [
        int(line.split("pid ")[1].split(",")[0])
        for line in log.read_text().splitlines()
        if line.startswith("rank ")
    ]
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: "goes on after step" in log.read_text(), wrapper)
    again = time.monotonic()
    wrapper.send_signal(signal.SIGTERM)
    assert wrapper.wait(TIMEOUT_SECONDS) == 75, log.read_text()[-4000:]
    text = log.read_text()
    assert "restart 1 of 3 in 1 s" in text and "told 2 ranks to save and stop" in text
    assert "stopped after step" in text
    print(
        f"\nthe wrapper under deepspeed: a checkpoint after {killed - began:.1f} s, where a rank was killed; "
        f"in training again {again - killed:.1f} s later; ended {time.monotonic() - again:.1f} s after its "
        "signal"
    )


@pytest.mark.skipif(not LONG, reason="waits for longer than a minute; set DSMIXER_LONG=1")
def test_a_rank_that_publishes_for_longer_than_the_ranks_waited_for_each_other_is_waited_for(
    runs: Runs,
) -> None:
    slow = at("publishing", "dawdles", seconds=90.0)
    job = runs.run("slow", *FEW, "health.hang_timeout=5", fault=slow)
    assert list(job.codes.values()) == [0, 0], job.output[-4000:]
    assert not job.lines("dsmixer: ")


RANK = """#!/usr/bin/env python3
# a rank that says who it is and, when it is told to stop, ends with 75
import os, signal, sys
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
with open(os.environ["FOLDER"] + "/pids", "a") as pids:
    pids.write(f"{os.environ['RANK']} {os.getpid()}\\n")
while not told:
    signal.pause()
sys.exit(75)
"""


def test_under_the_launcher_a_killed_rank_is_started_again_and_a_signal_ends_all_with_75(
    tmp_path: Path,
) -> None:
    """The real launcher and the wrapper, over ranks that do nothing, so that it takes seconds."""
    rank = tmp_path / "rank"
    rank.write_text(RANK)
    rank.chmod(0o755)
    pids = tmp_path / "pids"
    pids.touch()
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--no_python"]
    launcher += ["--master_port", str(free_port()), str(rank)]
    command = [sys.executable, str(REPOSITORY / "launch" / "supervise.py"), "--pause", "0.1", "--", *launcher]
    log = tmp_path / "log"
    with log.open("wb") as output:
        environment = {**launch_environment(), "FOLDER": str(tmp_path)}
        wrapper = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=tmp_path)
    wait_for(lambda: len(pids.read_text().splitlines()) == 2, wrapper)
    os.kill(int(dict(line.split() for line in pids.read_text().splitlines())["1"]), signal.SIGKILL)
    wait_for(lambda: len(pids.read_text().splitlines()) == 4, wrapper)
    wrapper.send_signal(signal.SIGTERM)
    assert wrapper.wait(TIMEOUT_SECONDS) == 75, log.read_text()[-4000:]
    text = log.read_text()
    assert "restart 1 of 3" in text and text.count("told 2 ranks to save and stop") == 1, text[-4000:]


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, "the wrapper has ended"
        time.sleep(POLL_SECONDS)
