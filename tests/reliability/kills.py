"""Kills a two-rank run again and again, takes it up each time, and holds its end against the run left alone.

    python tests/reliability/kills.py [--points 40] [--instants 60] [--folder /tmp/kills] [--seed 0]

Each kill is a SIGKILL of one rank or of the whole job: ``--points`` of them at a point of a save (an fsync, a
rename, a file of tensors half written, …), ``--instants`` at a random instant after the start. After each,
the same command is started again. A trial is a run that was killed a few times and then left to finish; its
losses, weights, moments, step counts, sampler and published files have to be those of the run left alone, bit
for bit, and no step may have been trained twice but those after the last published checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.comparing import RunRecord, same_bits
from support.forked import Job, RankServer
from support.tiny import write_recipe

RANKS, STEPS, EVERY = 2, 7, 3
NUM_SAVES = 6  # after steps 3, 6 and 7 of both stages
KILLS_A_TRIAL = 6


@dataclass(frozen=True)
class Kill:
    """One kill: at the ``at``-th point of a start's saves, or after a share ``at`` of a whole run's time."""

    kind: str
    at: float
    whole_job: bool
    rank: int

    def __str__(self) -> str:
        who = "the whole job" if self.whole_job else f"rank {self.rank}"
        what = (
            f"at point {self.at:.0f} of its saves"
            if self.kind == "point"
            else f"after {self.at:.0%} of a run"
        )
        return f"{who} {what}"


class Trials:
    """Killed runs, and the one left alone.

    Args:
        folder: for all of them.
        server: forks the ranks.
        more: arguments of the main job.
    """

    def __init__(self, folder: Path, server: RankServer, more: Sequence[str] = ()) -> None:
        self.folder, self.server, self.more = folder, server, list(more)
        self.recipe = write_recipe(folder)
        self.points = [0] * RANKS
        self.seconds = 0.0

    def arguments(self, name: str) -> list[str]:
        steps = [f"{stage}.max_steps={STEPS}" for stage in ("stage1", "stage2")]
        every = f"checkpoint.every={EVERY}"
        return ["--config", str(self.recipe), f"run.name={name}", every, *steps, *self.more]

    def leave_alone(self) -> None:
        """The run that all others are held against; learns how long it takes, and how many points it has."""
        told = self.folder / "points"
        counting = {"kind": "points", "ranks": [0, 1], "count": 10**9, "all": False, "to": str(told)}
        job = self.server.run(self.arguments("alone"), ranks=RANKS, fault=counting)
        assert list(job.codes.values()) == [0] * RANKS, job.output[-8000:]
        self.seconds = max(job.ended.values())
        self.points = [int(told.with_name(f"points-{rank}").read_text()) for rank in range(RANKS)]

    def trial(self, name: str, kills: Sequence[Kill]) -> dict[str, int]:
        """Kill a run once a start, then let it finish; what became of the kills.

        Raises:
            AssertionError: it did not end as the run left alone did, or a start was refused.
        """
        told = {"killed": 0, "late": 0}
        for kill in kills:
            before = self.record(name)
            job = self._start_and_kill(name, kill)
            killed = -signal.SIGKILL in job.codes.values()
            told["killed" if killed else "late"] += 1
            # 75: what is left of a job after its training obeys the launcher
            clean = {-signal.SIGKILL, -signal.SIGTERM, 0, 1, 75} if killed else {0}
            assert set(job.codes.values()) <= clean, f"{kill}: {job.codes}\n{job.output[-8000:]}"
            self._check_repeated(before, job)
            if not killed:
                break  # it was done before the kill came
        before = self.record(name)
        job = self.server.run(self.arguments(name), ranks=RANKS)
        assert list(job.codes.values()) == [0] * RANKS, job.output[-8000:]
        self._check_repeated(before, job)
        self._check_told(before, job)
        self._compare(name)
        shutil.rmtree(self.folder / "runs" / name)
        return told

    def _start_and_kill(self, name: str, kill: Kill) -> Job:
        if kill.kind == "point":
            fault = {"kind": "points", "ranks": [kill.rank], "count": int(kill.at), "all": kill.whole_job}
            return self.server.run(self.arguments(name), ranks=RANKS, fault=fault, as_launcher=True)
        job = self.server.start(self.arguments(name), ranks=RANKS)
        until = job.began + kill.at * self.seconds
        while time.monotonic() < until and len(job.codes) < RANKS:
            self.server.look()
        job.send(signal.SIGKILL, None if kill.whole_job else [kill.rank])
        return self.server.wait(job, as_launcher=True)

    def record(self, name: str) -> dict[int, int]:
        """Newest published step of each stage, 0 for none."""
        run = RunRecord(self.folder / "runs" / name)
        return {stage: max(run.steps(stage), default=0) for stage in (1, 2)}

    def _check_repeated(self, published: dict[int, int], job: Job) -> None:
        """A start goes on from what was published last, and from nothing else."""
        for stage, step in published.items():
            for line in job.lines(f"stage {stage} goes on after step "):
                assert int(line.split("after step ")[1].split()[0]) == step, line

    def _check_told(self, published: dict[int, int], job: Job) -> None:
        """A start that comes to its end says where it has gone on; nothing where a stage began anew."""
        stage = 2 if published[2] else 1
        if "is finished" in job.output or not 0 < published[stage] < STEPS + (stage == 2):
            return
        assert len(job.lines(f"stage {stage} goes on after step {published[stage]} of ")) == 1, job.output

    def _compare(self, name: str) -> None:
        ours, alone = RunRecord(self.folder / "runs" / name), RunRecord(self.folder / "runs" / "alone")
        same_bits(ours, alone)
        files = sorted(
            path.relative_to(alone.folder) for path in alone.folder.glob("mixture/**/*.safetensors")
        )
        assert files
        for file in files:
            assert (ours.folder / file).read_bytes() == (alone.folder / file).read_bytes(), file
        for stage in (1, 2):
            assert cursor(ours, stage) == cursor(alone, stage)
        left = [
            path.name for path in ours.folder.glob("checkpoints/*/*") if not path.name.startswith("step-")
        ]
        assert not left, f"an unfinished save is still there: {left}"


def cursor(run: RunRecord, stage: int) -> Any:
    """Where the sampler of the last checkpoint stands."""
    folder = run.folder / "checkpoints" / f"stage{stage}" / f"step-{run.steps(stage)[-1]:08d}"
    return json.loads((folder / "state.json").read_text())["cursor"]


def draw_kills(trials: Trials, points: int, instants: int, draw: random.Random) -> list[Kill]:
    """Kills in a random order; the points are spread evenly over those of a start's first two saves."""

    def who() -> dict[str, Any]:
        return {"whole_job": draw.random() < 0.5, "rank": draw.randrange(RANKS)}

    at_points = []
    for i in range(points):
        chosen = who()
        of_two_saves = 2 * trials.points[chosen["rank"]] // NUM_SAVES
        at_points.append(Kill("point", 1 + i * of_two_saves // points, **chosen))
    at_instants = [Kill("instant", draw.uniform(0.05, 0.8), **who()) for _ in range(instants)]
    kills = at_points + at_instants
    draw.shuffle(kills)
    return kills


def kill_all(trials: Trials, kills: Sequence[Kill], draw: random.Random) -> dict[str, int]:
    """All kills in trials, and again those that a finished run had left out."""
    total = {"killed": 0, "late": 0, "trials": 0}
    waiting = list(kills)
    while waiting:
        batch, waiting = waiting[:KILLS_A_TRIAL], waiting[KILLS_A_TRIAL:]
        told = trials.trial(f"trial-{total['trials']}", batch)
        total["trials"] += 1
        done = told["killed"] + told["late"]
        total["killed"] += told["killed"]
        total["late"] += told["late"]
        # what came too late, and what was not come to, is tried again on a fresh run
        waiting += [*batch[done:], *([earlier(batch[done - 1])] if told["late"] else [])]
        draw.shuffle(waiting)
        print(f"{total['killed']} kills in {total['trials']} trials, {len(waiting)} to come", flush=True)
    return total


def earlier(kill: Kill) -> Kill:
    """The same kill at half of its time."""
    return Kill(
        kill.kind, max(1.0, kill.at // 2) if kill.kind == "point" else kill.at / 2, kill.whole_job, kill.rank
    )


def main() -> int:
    """Ends with 0 where every trial ended as the run left alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--instants", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/dsmixer-kills"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="of the recipe, as deepspeed.zero_stage=3")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    draw = random.Random(args.seed)
    began = time.monotonic()
    with RankServer(args.folder) as server:
        trials = Trials(args.folder, server, args.overrides)
        trials.leave_alone()
        print(f"left alone: {trials.seconds:.0f} s, {trials.points} points in the ranks' saves", flush=True)
        total = kill_all(trials, draw_kills(trials, args.points, args.instants, draw), draw)
    seconds = time.monotonic() - began
    print(
        f"{total['killed']} kills in {total['trials']} trials ({total['late']} came after the end): every "
        f"run ended bit for bit as the one left alone; {seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
