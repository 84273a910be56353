"""A process of the doctor's own: it may crash or hang, and the doctor goes on and says so."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import dsmixer

SHOWN = 300
"""Characters of a child's last words that are repeated."""

QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        returncode: its exit code, negative for a signal; None where it never ran or had to be killed.
        out: its standard output.
        err: its standard error.
        trouble: why it failed, in a line; None if it ended with 0.
    """

    returncode: int | None
    out: str
    err: str
    trouble: str | None


class Child:
    """A process in a group of its own, which is killed when its time is over or the block is left.

    Its output goes to memory, so that a full disk can't lose it.

    Args:
        command: program and arguments.
        seconds: how long it may take.
        environment: over that of this process.
    """

    def __init__(
        self, command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._refused: str | None = None
        self._out, self._err = os.memfd_create("out"), os.memfd_create("err")
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._out,
                stderr=self._err,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            self._refused = f"{command[0]} can't be started: {error.strerror or error}"

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._kill()
        os.close(self._out)
        os.close(self._err)

    def running(self) -> bool:
        """Whether it is at work, and its time is not over."""
        return self._process is not None and self._process.poll() is None and time.monotonic() < self._until

    def hurry(self, seconds: float) -> None:
        """Give it no more than so much time from now on."""
        if time.monotonic() + seconds < self._until:
            self._until, self._seconds = time.monotonic() + seconds, seconds

    def ended(self) -> Ended:
        """Wait for it, no longer than its time, and say how it ended."""
        if self._process is None:
            return Ended(None, "", "", self._refused)
        try:
            code: int | None = self._process.wait(max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        self._kill()
        out, err = _text(self._out), _text(self._err)
        return Ended(code, out, err, self._trouble(code, err))

    def _trouble(self, code: int | None, err: str) -> str | None:
        if code == 0:
            return None
        if code is None:
            return f"no answer within {self._seconds:g} s"
        if code < 0:
            return f"it was killed by {signal.Signals(-code).name}"
        return last_words(err) or f"it ended with code {code}"

    def _kill(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also what it has started, and left
        self._process.wait()


def run_child(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a command to its end; see ``Child``."""
    with Child(command, seconds, environment) as child:
        return child.ended()


def python_child(
    module: str, arguments: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> Child:
    """A module of this package in an interpreter like this one, with the same packages."""
    root = str(Path(dsmixer.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH", ""), root)))
    # -P: a folder called torch in the working directory is not what a run would import either
    command = [sys.executable, "-P", "-m", module, *arguments]
    return Child(command, seconds, {**QUIET, "PYTHONPATH": paths, **(environment or {})})


def last_words(text: str) -> str:
    """The last line of a traceback or log, cut to what can be read."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:SHOWN] if lines else ""


def _text(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0).decode("utf-8", "replace")
