"""Runs a generated program in a process of its own, and says whether it came to its end.

This bounds the damage of a program that goes wrong: time, memory, sizes of files, processes, output. It is no
sandbox: a program that means harm can read and change what the user can.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dsmixer.config.errors import RunError

RUNNER = Path(__file__).with_name("code_runner.py")
PASSED = "passed"
MIB = 1 << 20
REPORT_BYTES = 1 << 16
LOOK_SECONDS = 0.02
"""Between two looks whether a process has ended."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of the clock, then it is killed.
        cpu_seconds: of CPU time.
        memory: address space, bytes.
        file_size: of each file that it writes, bytes.
        open_files: at a time.
        output: bytes that are kept of what it prints; the rest is read and dropped.
        new_processes: whether it may start processes and threads.
    """

    seconds: float = 30.0
    cpu_seconds: int = 10
    memory: int = 1024 * MIB
    file_size: int = 1 * MIB
    open_files: int = 64
    output: int = 64 * 1024
    new_processes: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        verdict: ``passed`` if every line of it was run; else why not.
        output: the beginning of what it printed, errors among it.
        seconds: from start to end.
        network_isolated: whether it had no network.
        processes_forbidden: whether it could start no process.
    """

    verdict: str
    output: str
    seconds: float
    network_isolated: bool
    processes_forbidden: bool


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run Python source with an empty environment in an empty folder, and kill what is left of it.

    A program passes by coming to its end: one that leaves before, with whatever exit code, does not.

    Args:
        program: the answer and its tests, as one text.
        limits: None: the defaults.

    Raises:
        RunError: no process could be started or watched, which is not the program's fault.
    """
    limits = limits or Limits()
    token, began = secrets.token_hex(16), time.monotonic()
    report_end, write_end = os.pipe()
    with (
        tempfile.TemporaryDirectory(prefix="dsmixer-program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as order,
        os.fdopen(report_end, "rb", buffering=0) as report,
    ):
        given = asdict(limits) | {"program": program, "report": write_end, "token": token}
        order.write(json.dumps(given).encode())
        order.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(RUNNER)],
                stdin=order,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={},
                start_new_session=True,
                pass_fds=(write_end,),
                bufsize=0,
            )
        except OSError as error:
            raise RunError(f"no process for a generated program could be started: {error}") from error
        finally:
            os.close(write_end)
        assert process.stdout is not None
        with process.stdout as output:
            in_time = _watched(process, {output: limits.output, report: REPORT_BYTES}, began + limits.seconds)
            printed, told = in_time.texts[output], in_time.texts[report]
    return _outcome(process.returncode, in_time.ended, printed, told, token, time.monotonic() - began)


@dataclass(frozen=True)
class _Watched:
    ended: bool
    texts: dict[IO[bytes], bytes]


def _watched(process: subprocess.Popen[bytes], pipes: dict[IO[bytes], int], deadline: float) -> _Watched:
    """Read the pipes, each up to so many bytes, until the process ends or its time is over; end its group."""
    kept = {pipe: bytearray() for pipe in pipes}
    try:
        ended = _read_until(process, kept, pipes, deadline)
    except OSError as error:
        raise RunError(f"the process of a generated program can't be watched: {error}") from error
    finally:
        _end_group(process)
    for pipe in pipes:  # what is in the pipe at the end, whoever else holds it open
        while len(kept[pipe]) < pipes[pipe] and _read(pipe, kept, pipes):
            pass
    return _Watched(ended, {pipe: bytes(text) for pipe, text in kept.items()})


def _read_until(
    process: subprocess.Popen[bytes],
    kept: dict[IO[bytes], bytearray],
    bounds: dict[IO[bytes], int],
    deadline: float,
) -> bool:
    """Read the pipes until the process has ended or its time is over; whether it has.

    It asks now and then: a descriptor that tells (``pidfd_open``) is not to be had before Linux 5.3, nor
    where a machine runs out of descriptors.
    """
    with selectors.DefaultSelector() as selector:
        for pipe in kept:
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ)
        while not (ended := _has_ended(process)) and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(min(left, LOOK_SECONDS)):
                if not _read(key.fileobj, kept, bounds):  # its end: nobody holds the other one
                    selector.unregister(key.fileobj)
    return ended


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping it: its number stays its own until its group has been ended."""
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    try:
        return os.waitid(os.P_PID, process.pid, look) is not None
    except ChildProcessError:  # reaped already, where the signal of a child's end is ignored
        return True


def _read(pipe: Any, kept: dict[IO[bytes], bytearray], bounds: dict[IO[bytes], int]) -> bool:
    """Take a piece of what is there; whether there may be more."""
    piece = pipe.read(1 << 16)
    kept[pipe] += (piece or b"")[: bounds[pipe] - len(kept[pipe])]
    return bool(piece)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(code: int, ended: bool, printed: bytes, told: bytes, token: str, seconds: float) -> Outcome:
    reports = _reports(told)
    isolated = next((one["isolated"] for one in reports if "isolated" in one), None)
    output = printed.decode(errors="replace")
    if isolated is None and ended:
        problem = f"the process for a generated program ended before it began: {output[-500:] or code}"
        raise RunError(problem, fix=f"see whether this runs: env -i {sys.executable} -I -c pass")
    errors = [str(one["error"]) for one in reports if "error" in one]
    if not ended:
        verdict = "out of time"
    elif any(one.get("token") == token for one in reports):
        verdict = PASSED
    elif errors:
        verdict = errors[0]
    elif code == -signal.SIGXCPU:
        verdict = "out of CPU time"
    elif code < 0:
        verdict = f"ended by signal {-code}"
    else:
        verdict = f"left before its end, with exit code {code}"
    isolated = isolated or {}
    return Outcome(verdict, output, seconds, bool(isolated.get("network")), bool(isolated.get("processes")))


def _reports(told: bytes) -> list[dict[str, Any]]:
    """The report's lines that can be read; a program may write there as well."""
    found = []
    for line in told.splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found
