"""The steps of a stage that are profiled, and what they come to: ``profile.json`` and a table."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dsmixer.checkpoint.atomic import write_json
from dsmixer.config.errors import UserError
from dsmixer.placement import groups
from dsmixer.report.json_file import read_json
from dsmixer.report.profile_table import profile_table
from dsmixer.training.health import Stopped
from dsmixer.training.loop import Loop
from dsmixer.training.profile.clock import PARTS, PROFILING, REST, SAVING, Clock, NamedRanges
from dsmixer.training.profile.ranges import Call, timed
from dsmixer.training.progress import console
from dsmixer.training.telling import lossy, tell, tell_problem
from dsmixer.training.world import gather_objects

WARM_UP = 3
"""Steps before the first profiled one: the first ones of a process take longer than those that follow."""

TRACED = 2
"""Steps of a trace: each is some thousand events a layer."""


@dataclass(frozen=True)
class ProfileRequest:
    """What the command line asked for.

    Attributes:
        steps: to profile in each stage; 0: none.
        trace: whether a trace of a few more steps is written.
    """

    steps: int = 0
    trace: bool = False


@dataclass(frozen=True)
class TimedStep:
    """One profiled step of this rank: its number from 1, wall seconds, and seconds and calls by part."""

    step: int
    wall: float
    seconds: dict[str, float]
    calls: dict[str, int]


@dataclass
class StageProfile:
    """Profiles some steps of a stage.

    Attributes:
        request: how many.
        loop: of the stage.
        first: the step that this start begins with, from 0.
        folder: of the run.
        saves: the function that saves where a checkpoint is due, as a call of the part ``saving``.
        timed, traced: the steps that are profiled and those that are traced, from 0.
    """

    request: ProfileRequest
    loop: Loop
    first: int
    folder: Path
    saves: Call
    timed: range = field(init=False)
    traced: range = field(init=False)
    _steps: list[TimedStep] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)
    _found: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        left = self.loop.stage.num_steps - self.first
        self._warm_up = min(WARM_UP, left // 2)
        traced = min(TRACED, left - self._warm_up - 1) if self.request.trace else 0
        rest = range(self.first + self._warm_up, self.first + left - traced)
        self.timed = rest[: self.request.steps]
        self.traced = range(self.timed.stop, self.timed.stop + traced)
        self._clock = Clock(self.loop.world.device)

    def __enter__(self) -> StageProfile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        # a signal stops all ranks after the same step
        if kind is Stopped and self._steps:
            self._finish()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """All that happens from the beginning of this step, from 0, to that of the next."""
        if step in self.timed:
            if step == self.timed.start:
                self._stack.enter_context(timed(self.loop, self._clock, (self.saves,)))
            self._clock.start()
            began = time.perf_counter()
            yield
            seconds, calls = self._clock.stop()
            self._steps.append(TimedStep(step + 1, time.perf_counter() - began, seconds, calls))
            if step == self.timed[-1]:
                self._stack.close()
                self._finish()
        elif step in self.traced:
            if step == self.traced.start:
                self._stack.enter_context(self._trace())
            yield
            if step == self.traced[-1]:
                self._stack.close()
        else:
            yield

    def show(self) -> None:
        """Print the table, on rank 0."""
        if self._found is not None:
            console(lossy(sys.stdout)).print(profile_table(self.loop.stage.number, self._found))

    def _finish(self) -> None:
        """Put the ranks' figures together; a collective."""
        steps, self._steps = self._steps, []
        gathered = gather_objects(self.loop.world, summary(steps))
        if self.loop.world.rank != 0:
            return
        self._found = {
            "first_step": steps[0].step,
            "last_step": steps[-1].step,
            "warm_up": self._warm_up,
            "device": self.loop.world.device.type,
            "ranks": self.loop.world.size,
            "expert_parallel_size": self.loop.engine.mixture.placement.layout.size,
            "zero_stage": groups.zero_stage(self.loop.engine.engine),
            **gathered[0],
            "by_rank": [_means(of_rank) for of_rank in gathered],
            "steps": [_as_row(step) for step in steps],
        }
        self._write(self.folder / "profile.json", self._found)

    def _write(self, path: Path, found: Mapping[str, Any]) -> None:
        """Beside what the file has of the other stage; a disk that refuses it is no reason to stop."""
        try:
            before = (read_json(path) or {}).get("stages", {})
        except UserError:
            before = {}
        try:
            write_json(path, {"stages": {**before, str(self.loop.stage.number): found}})
        except OSError as error:
            tell_problem(f"warning: {path}: {error.strerror}; the profile is only shown")

    @contextmanager
    def _trace(self) -> Iterator[None]:
        """A trace of ``torch.profiler``, in which the parts are named."""
        if self.loop.world.rank != 0:
            yield
            return
        path = self.folder / f"trace-stage{self.loop.stage.number}.json.gz"
        with timed(self.loop, NamedRanges(), (self.saves,)), torch.profiler.profile() as profiler:
            yield
        profiler.export_chrome_trace(str(path))
        tell(f"trace of {len(self.traced)} steps: {path}")


def summary(steps: Sequence[TimedStep]) -> dict[str, Any]:
    """The figures of one rank over its profiled steps.

    A step is what its parts add up to; what the profile itself took is taken off its wall time.
    """
    rows = [_parts(step.seconds) for step in steps]
    total = [sum(row.values()) for row in rows]
    return {
        "seconds": statistics.fmean(total),
        "median_seconds": statistics.median(total),
        "wall_seconds": statistics.fmean(step.wall for step in steps),
        "profiling_seconds": statistics.fmean(step.seconds.get(PROFILING, 0.0) for step in steps),
        "saving_seconds": statistics.fmean(step.seconds.get(SAVING, 0.0) for step in steps),
        "parts": {
            part: {
                "seconds": statistics.fmean(row[part] for row in rows),
                "median_seconds": statistics.median(row[part] for row in rows),
                "share": sum(row[part] for row in rows) / sum(total),
                "calls": statistics.fmean(step.calls.get(part, 0) for step in steps),
            }
            for part in PARTS
        },
    }


def _parts(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each part; saving is a share of the loop."""
    found = {part: seconds.get(part, 0.0) for part in PARTS}
    return {**found, REST: found[REST] + seconds.get(SAVING, 0.0)}


def _means(of_rank: Mapping[str, Any]) -> dict[str, float]:
    parts = {part: figures["seconds"] for part, figures in of_rank["parts"].items()}
    return {"seconds": of_rank["seconds"], **parts}


def _as_row(step: TimedStep) -> dict[str, Any]:
    return {"step": step.step, "wall_seconds": step.wall, **_parts(step.seconds)}
