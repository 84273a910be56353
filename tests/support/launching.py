"""Run a script under the real ``deepspeed`` launcher, on CPU ranks of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
TIMEOUT_SECONDS = 900.0
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


def launch(script: Path, arguments: Sequence[str], *, ranks: int) -> Launched:
    """Run ``script`` on ``ranks`` processes; a launch past the timeout fails and leaves no process behind.

    Args:
        script: a Python file that joins torch.distributed by the launcher's environment.
        arguments: of the script.
        ranks: W.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    process = subprocess.Popen(
        [*command, str(script), *arguments],
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {TIMEOUT_SECONDS:.0f} s\n{output[-8000:]}") from error
    finally:
        if process.poll() is None:  # the test was interrupted: its processes go with it
            os.killpg(process.pid, signal.SIGKILL)
    return Launched(process.returncode, output)


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
