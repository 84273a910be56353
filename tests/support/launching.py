"""Run a script under the real ``deepspeed`` launcher, on CPU ranks of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
TIMEOUT_SECONDS = 10800.0 if os.environ.get("DSMIXER_LONG") == "1" else 900.0
"""Far above what a launch takes: it ends a launch that hangs, it measures nothing."""


@dataclass(frozen=True)
class Launched:
    """How a launch ended: the launcher's exit code and everything its processes printed."""

    returncode: int
    output: str

    def check(self) -> Launched:
        """Fail with the end of the output unless the launch ended well."""
        assert self.returncode == 0, f"exit code {self.returncode}\n{self.output[-8000:]}"
        return self


@dataclass(frozen=True)
class Node:
    """What one node of a launch over several is given.

    Attributes:
        arguments: of the script.
        environment: over that of ``launch_environment``.
        cwd: the working directory.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: Path = REPOSITORY


def launch(script: Path, arguments: Sequence[str], *, ranks: int) -> Launched:
    """Run ``script`` on ``ranks`` processes; a launch past the timeout fails and leaves no process behind.

    Args:
        script: a Python file that joins torch.distributed by the launcher's environment.
        arguments: of the script.
        ranks: W.
    """
    flags = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return run_together([[*_launcher(), *flags, str(script), *arguments]])[0]


def launch_nodes(script: Path, nodes: Sequence[Node], *, ranks: int) -> list[Launched]:
    """Run ``script`` by a launcher a node, ``--no_ssh --node_rank N``, all on this machine.

    Args:
        script: as of ``launch``.
        nodes: what each is given.
        ranks: of a node.
    """
    with tempfile.TemporaryDirectory() as folder:
        hostfile = Path(folder) / "hostfile"
        hostfile.write_text("".join(f"node-{n} slots={ranks}\n" for n in range(len(nodes))))
        flags = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1"]
        flags += ["--master_port", str(free_port())]
        commands = [
            [*_launcher(), *flags, "--node_rank", str(n), str(script), *node.arguments]
            for n, node in enumerate(nodes)
        ]
        return run_together(commands, nodes)


def _launcher() -> list[str]:
    return [str(Path(sys.executable).with_name("deepspeed"))]


def run_together(commands: Sequence[Sequence[str]], nodes: Sequence[Node] = ()) -> list[Launched]:
    """Run commands at the same time, and wait for all of them.

    Args:
        commands: to run.
        nodes: the environment and working directory of each; none: those of every launch.
    """
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        processes = [
            subprocess.Popen(
                command,
                cwd=node.cwd,
                env={**launch_environment(), **node.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for command, node, log in zip(commands, nodes or [Node(())] * len(commands), logs, strict=True)
        ]
        overdue = False
        try:
            until = time.monotonic() + TIMEOUT_SECONDS
            for process in processes:
                process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            overdue = True
        finally:
            for process in processes:
                if process.poll() is None:  # overdue, or the test was interrupted: its processes go with it
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        outputs = []
        for log in logs:
            log.seek(0)
            outputs.append(log.read().decode("utf-8", "replace"))
        assert not overdue, f"no end after {TIMEOUT_SECONDS:.0f} s\n" + "\n".join(o[-8000:] for o in outputs)
        return [Launched(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def launch_environment() -> dict[str, str]:
    """One thread a rank, so that two cores suffice and sums come in one order; no network, no GPU."""
    path = [str(REPOSITORY), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
