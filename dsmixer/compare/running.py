"""Runs the cells of a comparison, several at once, each after what it needs."""

from __future__ import annotations

import fcntl
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from dsmixer.checkpoint.atomic import make_folder, write_json
from dsmixer.compare.launching import Ended, Process, Resources
from dsmixer.compare.plan import Cell, Plan
from dsmixer.compare.state import state_of
from dsmixer.config.errors import UserError

How = Literal["was done", "done", "failed", "stopped", "not run"]
STOPPED = 75
POLL_SECONDS = 0.1
LOG_TAIL, LONGEST_ERROR = 20_000, 300


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: whose.
        how: it ended; ``not run`` where a signal came first or what it needs failed.
        seconds: it took now.
        code: exit code of its process.
    """

    cell: Cell
    how: How
    seconds: float = 0.0
    code: int | None = None


class Runner:
    """Goes through a plan once.

    Args:
        plan: what to run.
        resources: how many cells at once, and ranks a cell.
        say: takes a line for people.
    """

    def __init__(self, plan: Plan, resources: Resources, say: Callable[[str], None]) -> None:
        self._plan, self._resources, self._say = plan, resources, say
        self._outcomes: dict[str, Outcome] = {}
        self._running: list[Process] = []
        self._signals = 0

    def run(self) -> list[Outcome]:
        """Run what is left; the outcome of every cell, in the order of the plan."""
        waiting = []
        for cell in self._plan.cells:
            if state_of(self._plan, cell) == "done":
                self._outcomes[cell.name] = Outcome(cell, "was done")
            else:
                waiting.append(cell)
        with self._listening():
            try:
                self._go_through(waiting)
            finally:
                self._end_all()
        return [self._outcomes[cell.name] for cell in self._plan.cells]

    @property
    def stopped(self) -> bool:
        """Whether a signal came."""
        return self._signals > 0

    def _go_through(self, waiting: list[Cell]) -> None:
        told = 0
        while waiting or self._running:
            if self._signals > told:
                told = self._signals
                self._hand_on()
            if self.stopped:
                self._outcomes |= {cell.name: Outcome(cell, "not run") for cell in waiting}
                waiting = []
            else:
                waiting = self._start(waiting)
            self._reap()
            if self._running:
                time.sleep(POLL_SECONDS)

    def _start(self, waiting: list[Cell]) -> list[Cell]:
        """Start what may run now; what is still to wait."""
        left = []
        for cell in waiting:
            needed = None if cell.needs is None else self._outcomes.get(cell.needs)
            if needed is not None and needed.how not in ("was done", "done"):
                self._outcomes[cell.name] = Outcome(cell, "not run")
                self._say(
                    f"{cell.name}: not run, for {cell.needs} {needed.how.replace('not run', 'was not')}"
                )
            elif len(self._running) < self._resources.jobs and (cell.needs is None or needed is not None):
                self._begin(cell)
            else:
                left.append(cell)
        return left

    def _begin(self, cell: Cell) -> None:
        taken = {process.slot for process in self._running}
        slot = next(number for number in range(self._resources.jobs) if number not in taken)
        again = " again" if state_of(self._plan, cell) == "begun" else ""
        self._running.append(Process(self._plan, cell, self._resources, slot))
        number, total = self._plan.cells.index(cell) + 1, len(self._plan.cells)
        self._say(f"{cell.name}: started{again} ({number} of {total})")

    def _reap(self) -> None:
        for process in list(self._running):
            ended = process.poll()
            if ended is not None:
                self._running.remove(process)
                self._note(process, ended)

    def _note(self, process: Process, ended: Ended) -> None:
        cell, how = process.cell, self._how(ended.code)
        if how == "done" and state_of(self._plan, cell) != "done":
            how = "failed"
        self._outcomes[cell.name] = Outcome(cell, how, ended.seconds, ended.code)
        write_usage(process.log, ended)
        text = f"{cell.name}: {how} after {ended.seconds:.0f} s"
        if how == "failed":
            text += f" with exit code {ended.code}; see {process.log}{last_error(process.log)}"
        self._say(text)

    def _how(self, code: int) -> How:
        if code == 0:
            return "done"
        killed = code < 0 or code > 128
        return "stopped" if code == STOPPED or (self.stopped and killed) else "failed"

    def _hand_on(self) -> None:
        names = ", ".join(process.cell.name for process in self._running)
        self._say(f"stopping: {names or 'nothing'} runs, and is asked to save")
        for process in self._running:
            process.stop()

    def _end_all(self) -> None:
        """Leave no cell behind, whatever ended the comparison."""
        for process in self._running:
            process.stop()
        while self._running:
            self._reap()
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def note(number: int, frame: object) -> None:
            self._signals += 1

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def last_error(log: Path) -> str:
    """The last error that a log tells, on a line of its own; empty where it tells none."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        lines = file.read().decode("utf-8", "replace").splitlines()
    told = [line.strip() for line in lines if "error: " in line.lower()]
    return f"\n  {told[-1][:LONGEST_ERROR]}" if told else ""


def write_usage(log: Path, ended: Ended) -> None:
    """Keep a process's time and memory beside its log, with those of earlier starts of the cell."""
    path = log.with_suffix(".json")
    before = read_usage(log)
    usage = {
        "seconds": before["seconds"] + ended.seconds,
        "peak_bytes": max(before["peak_bytes"], ended.peak_bytes),
        "code": ended.code,
    }
    write_json(path, usage)


def read_usage(log: Path) -> dict[str, float]:
    """What ``write_usage`` wrote; zeros where nothing is."""
    path = log.with_suffix(".json")
    if not path.is_file():
        return {"seconds": 0.0, "peak_bytes": 0.0}
    return dict(json.loads(path.read_text(encoding="utf-8")))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a comparison's folder against another call.

    Raises:
        UserError: another call works in it.
    """
    make_folder(folder)
    with (folder / ".lock").open("a") as lock:
        _lock(lock, folder)
        yield


def _lock(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        fix = "wait for it, or give this one another name: run.name=NAME"
        raise UserError("another dsmixer compare works in this folder", where=str(folder), fix=fix) from error
