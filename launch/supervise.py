"""Runs a launcher, hands a signal to its ranks instead of to it, and starts it again when a run breaks.

    python launch/supervise.py [--restarts N] -- deepspeed [flags] launch/train.py --config RECIPE.yaml

DeepSpeed's launcher kills its ranks 30 s after a signal; a rank that is signalled itself saves as long as it
takes, with all others, and the job ends with 75. So this wrapper looks for the ranks below the launcher and
signals those. It ends with the launcher's code: 0 done, 2 wrong input, 75 stopped by its signal after saving.
After any other end it starts the launcher again, at most N times in a row: the same command goes on from the
last checkpoint. Where no rank is to be seen here, as below ssh, the command itself gets the signal.
On several nodes each has a wrapper around its own launcher (--no_ssh): docs/multi-node.md.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

DONE, WRONG_INPUT, STOPPED = 0, 2, 75
LEFT_ALONE = 1
"""The code where a launcher ended with 0 and left ranks behind, as one does whose child was killed."""
POLL_SECONDS = 1.0
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
SETTLED_SECONDS = 3600.0
"""A launcher that ran this long before it failed gets its restarts, and short pauses, anew."""
ROWS_IN_ALL = 10
"""So many times as many restarts in all: what fails after an hour each time does not go on for ever."""
RANKLESS_SECONDS = 5.0
"""How long a signal waits for a rank to come up, before the command itself gets it."""
GRACE_SECONDS = 60.0
"""How long ranks may outlive their launcher, or stand stopped, before they are killed."""
STANDARD_ERROR = 2
RANK_VARIABLES = ("RANK", "LOCAL_RANK")
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl: ranks whose launcher dies become children of the wrapper


def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise; the exit code of the process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="N",
        help="most restarts without an hour between (3); ten times as many in all",
    )
    parser.add_argument(
        "--pause", type=float, default=FIRST_PAUSE, help="seconds before the first restart, then twice (5)"
    )
    parser.add_argument(
        "--stop-file",
        type=Path,
        metavar="PATH",
        help="a file that has the effect of SIGTERM once it is there",
    )
    parser.add_argument("command", nargs="+", help="-- and then the launcher with its arguments")
    args = parser.parse_args(arguments)
    become_subreaper()
    supervisor = Supervisor(args.command, args.restarts, args.pause, args.stop_file)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.on_signal)
    return supervisor.run()


def become_subreaper() -> None:
    """Let orphans below this process become its children, where the system can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)


class Supervisor:
    """One launcher after the other.

    Args:
        command: the launcher and its arguments.
        restarts: at most so many in a row, and ten times as many in all.
        pause: seconds before the first of them.
        stop_file: stands for a signal.
    """

    def __init__(self, command: list[str], restarts: int, pause: float, stop_file: Path | None) -> None:
        self._command, self._restarts, self._pause, self._stop_file = command, restarts, pause, stop_file
        self._signal: int | None = None
        self._passed_to: set[int] = set()
        self._rankless_since: float | None = None

    def on_signal(self, number: int, frame: object) -> None:
        """Note it; the loop hands it on. Another one goes to the ranks again."""
        self._signal = number
        self._forget_passed()

    def run(self) -> int:
        """Until there is nothing left to start."""
        failures, restarted = 0, 0
        while True:
            began = time.monotonic()
            code = self._launch()
            lasted = time.monotonic() - began
            if code in (DONE, WRONG_INPUT) or self._is_stopped():
                return code
            failures = 1 if lasted > SETTLED_SECONDS else failures + 1
            most = ROWS_IN_ALL * self._restarts
            if failures > self._restarts or restarted >= most:
                left = f"{self._restarts}" if failures > self._restarts else f"{most} in all"
                say(f"the launcher ended with {code}; no restart is left of {left}")
                return code
            restarted += 1
            pause = min(self._pause * 2 ** (failures - 1), LONGEST_PAUSE)
            say(
                f"the launcher ended with {meaning(code)} after {lasted:.0f} s; restart {failures} of "
                f"{self._restarts} in {pause:.0f} s"
            )
            self._wait(pause)
            if self._is_stopped():
                return code

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._is_stopped():
            time.sleep(min(POLL_SECONDS, seconds))

    def _is_stopped(self) -> bool:
        if self._signal is None and self._stop_file is not None and self._stop_file.exists():
            self._signal = signal.SIGTERM
        return self._signal is not None

    def _launch(self) -> int:
        """One launcher, to its end and that of its ranks; its exit code."""
        self._forget_passed()
        # a session of its own: what a terminal or a batch system sends to all processes must not reach it
        try:
            launcher = subprocess.Popen(self._command, env=environment(), start_new_session=True)
        except OSError as error:
            say(f"can't start {self._command[0]}: {error.strerror}")
            return WRONG_INPUT
        stopped_since: dict[int, float] = {}
        while launcher.poll() is None:
            if self._is_stopped():
                self._pass_on(launcher)
            kill_stopped(stopped_since)
            time.sleep(POLL_SECONDS)
        left = list(ranks_below(os.getpid()))
        if left:
            say(f"the launcher ended with {launcher.returncode}, and {len(left)} ranks go on without it")
            self._end(left)
        code = launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode
        return LEFT_ALONE if left and code == DONE else code

    def _pass_on(self, launcher: subprocess.Popen[bytes]) -> None:
        """The signal to each rank once; one that has not come up yet gets it later."""
        assert self._signal is not None
        new = [pid for pid in ranks_below(launcher.pid) if pid not in self._passed_to]
        for pid in new:
            send(pid, signal.SIGTERM)
        self._passed_to.update(new)
        if new:
            say(f"told {len(new)} ranks to save and stop (pids {', '.join(map(str, new))})")
        if not self._passed_to:
            self._pass_to_command(launcher)

    def _pass_to_command(self, launcher: subprocess.Popen[bytes]) -> None:
        """The signal to the command itself, once, where no rank has come up for a while."""
        now = time.monotonic()
        if self._rankless_since is None:
            self._rankless_since = now
        if now - self._rankless_since >= RANKLESS_SECONDS:
            self._passed_to.add(launcher.pid)
            say(f"no rank is to be seen here; the signal goes to the command itself (pid {launcher.pid})")
            send(launcher.pid, signal.SIGTERM)

    def _forget_passed(self) -> None:
        self._passed_to.clear()
        self._rankless_since = None

    def _end(self, pids: list[int]) -> None:
        """Ranks without a launcher: they are asked to save, and killed if that takes too long."""
        for pid in pids:
            send(pid, signal.SIGTERM)
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until and any(state_of(pid) not in (None, "Z") for pid in pids):
            time.sleep(POLL_SECONDS)
        for pid in pids:
            send(pid, signal.SIGKILL)


def say(text: str) -> None:
    """A line on standard error, if that takes it."""
    with contextlib.suppress(OSError):  # a log that can't be written is no reason to leave the ranks alone
        os.write(STANDARD_ERROR, f"supervise: {text}\n".encode(errors="replace"))


def meaning(code: int) -> str:
    """An exit code in words."""
    known = {STOPPED: "75 (somebody else stopped a rank)", 1: "1 (a rank failed)"}
    killed = code - 256 if code > 192 else 128 - code
    if code > 128 and -killed in set(signal.Signals):
        return f"{code} (a process was killed by {signal.Signals(-killed).name})"
    return known.get(code, str(code))


def environment() -> dict[str, str]:
    """This process's, without a rank of its own: what is below the launcher is known by having one."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def ranks_below(pid: int) -> Iterator[int]:
    """Processes below ``pid`` that a launcher has told their rank; not what those have started themselves."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = fields_of(stat)
        if fields is not None:
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    waiting = list(children.get(pid, ()))
    while waiting:
        own = waiting.pop()
        if is_rank(own):
            yield own
        else:
            waiting += children.get(own, ())


def is_rank(pid: int) -> bool:
    """Whether the environment of a process holds a rank."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    names = {variable.partition(b"=")[0] for variable in variables}
    return {name.encode() for name in RANK_VARIABLES} <= names and state_of(pid) not in (None, "Z")


def kill_stopped(since: dict[int, float]) -> None:
    """Kill a rank that has been stopped (SIGSTOP) for long: no launcher notices it, and the others have left.

    Args:
        since: when each was first seen stopped; kept from call to call.
    """
    now = time.monotonic()
    stopped = {pid for pid in ranks_below(os.getpid()) if state_of(pid) == "T"}
    for pid in set(since) - stopped:
        del since[pid]
    for pid in stopped:
        if now - since.setdefault(pid, now) > GRACE_SECONDS:
            say(f"the rank with pid {pid} has been stopped for {GRACE_SECONDS:.0f} s; it is killed")
            send(pid, signal.SIGKILL)


def state_of(pid: int) -> str | None:
    """``R``, ``S``, ``T``, ``Z``, … of a process; None where there is none."""
    fields = fields_of(Path(f"/proc/{pid}/stat"))
    return None if fields is None else fields[0]


def fields_of(stat: Path) -> list[str] | None:
    """What stands in a ``/proc/PID/stat`` behind the name, which may hold anything."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
