"""Jobs of real ranks that are forked from one process with the libraries imported: a job takes seconds.

The ranks are processes as under ``deepspeed``, with the environment that its launcher gives them; only the
launcher is not there. The server is this file run as a script; a test holds it by ``RankServer``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.launching import TIMEOUT_SECONDS, free_port, launch_environment

POLL_SECONDS = 0.05
LAUNCHER_SECONDS = 30.0


@dataclass
class Job:
    """One job on its way.

    Attributes:
        pids: of the ranks.
        log: what they print.
        began: on ``time.monotonic``.
        codes: of the ranks that have ended, by rank; minus the number of a signal.
        ended: when each ended, seconds after the beginning.
    """

    pids: list[int]
    log: Path
    began: float
    codes: dict[int, int] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self, part: str) -> list[str]:
        """Lines of the output that hold a text."""
        return [line for line in self.output.splitlines() if part in line]

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """A signal to some ranks, or to all."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if rank not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)


class RankServer:
    """The process that ranks are forked from.

    Args:
        folder: for the logs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs: dict[int, tuple[Job, int]] = {}
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(os.getpid())],
            env=launch_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, arguments: Sequence[str], *, ranks: int, fault: Mapping[str, Any] | None = None) -> Job:
        """Start the main job.

        Args:
            arguments: of ``launch/train.py``.
            ranks: W.
            fault: what ``support.fault_ranks.prepare`` does in each of them.
        """
        self._count += 1
        log = self._folder / f"job-{self._count}.log"
        request = {"arguments": list(arguments), "ranks": ranks, "fault": dict(fault or {})}
        pids = self._ask({**request, "log": str(log), "port": free_port()})
        job = Job(pids, log, time.monotonic())
        self._jobs |= {pid: (job, rank) for rank, pid in enumerate(pids)}
        return job

    def look(self) -> None:
        """Learn which ranks have ended; takes a moment, so that a loop around it does not spin."""
        time.sleep(POLL_SECONDS)
        for pid, status in self._ask({}):
            job, rank = self._jobs.pop(pid)
            job.codes[rank] = os.waitstatus_to_exitcode(status)
            job.ended[rank] = time.monotonic() - job.began

    def wait(self, job: Job, seconds: float = TIMEOUT_SECONDS, *, as_launcher: bool = False) -> Job:
        """Until all ranks of a job have ended; past the time they are killed and the test fails.

        Args:
            job: that was started.
            seconds: at most.
            as_launcher: do as DeepSpeed's launcher once a rank has ended badly: SIGTERM to the others, and
                SIGKILL 30 s later.
        """
        until = time.monotonic() + seconds
        told: float | None = None
        while len(job.codes) < len(job.pids):
            self.look()
            if as_launcher and told is None and any(job.codes.values()):
                told = time.monotonic()
                job.send(signal.SIGTERM)
            if told is not None and time.monotonic() > told + LAUNCHER_SECONDS:
                job.send(signal.SIGKILL)
            if time.monotonic() > until:
                job.send(signal.SIGKILL)
                raise AssertionError(f"no end after {seconds:.0f} s\n{job.output[-8000:]}")
        return job

    def run(
        self,
        arguments: Sequence[str],
        *,
        ranks: int,
        fault: Mapping[str, Any] | None = None,
        as_launcher: bool = False,
    ) -> Job:
        """``start`` and ``wait``."""
        return self.wait(self.start(arguments, ranks=ranks, fault=fault), as_launcher=as_launcher)

    def close(self) -> None:
        """End the server, and what is left of its ranks."""
        for job, _ in list(self._jobs.values()):
            job.send(signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> RankServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def serve() -> int | None:
    """Fork a job a request, and answer with its pids; an empty request asks for those that have ended."""
    import deepspeed  # noqa: F401
    import matplotlib.backends.backend_svg  # noqa: F401
    import pandas  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import dsmixer.training.run  # noqa: F401

    gc.freeze()  # what is imported is never garbage: no rank needs to look through it
    for line in sys.stdin:
        request = json.loads(line)
        if not request:
            print(json.dumps(ended()), flush=True)
            continue
        pids = []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                return be_rank(rank, request)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
    return None


def ended() -> list[tuple[int, int]]:
    """Pids and statuses of the ranks that have ended since the last time."""
    found = []
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found.append(ended)
    return found


def be_rank(rank: int, request: Mapping[str, Any]) -> int:
    """What a rank does under a launcher; the exit code of the process."""
    from dsmixer.cli.train import main
    from support.fault_ranks import prepare

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    size = str(request["ranks"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_SIZE=size, CROSS_RANK="0")
    os.environ.update(CROSS_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]))
    if request["fault"]:
        prepare(rank, request["fault"])
    return main(request["arguments"])


if __name__ == "__main__":
    sys.exit(serve())
