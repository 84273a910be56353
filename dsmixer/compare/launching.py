"""The process of a cell: its command, its environment, and how a signal reaches it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsmixer.compare.plan import Cell, Plan
from dsmixer.compare.state import method_file, settings_file, write_asked
from dsmixer.config.errors import UserError

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl: a cell whose comparison was killed saves and stops
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Looked up here: a process that has just forked must not load anything."""
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Resources:
    """What the cells of a comparison share.

    Attributes:
        jobs: cells at once.
        processes: ranks a cell.
    """

    jobs: int = 1
    processes: int = 1


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; minus the signal that killed it.
        seconds: it took.
        peak_bytes: most resident memory of it or of one below it.
    """

    code: int
    seconds: float
    peak_bytes: int


class Process:
    """A cell that runs.

    Args:
        plan: of the comparison.
        cell: to run.
        resources: of all cells.
        slot: which of the jobs it is, from 0.
    """

    def __init__(self, plan: Plan, cell: Cell, resources: Resources, slot: int) -> None:
        self.cell, self.slot, self.log = cell, slot, plan.log(cell)
        self._processes, self._began = resources.processes, time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        arguments = command(plan, cell, resources, slot)
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(arguments)}\n".encode())
            log.flush()
            # a session of its own: a terminal's Ctrl-C reaches it once, through the comparison
            self._popen = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(resources, slot),
                start_new_session=True,
                preexec_fn=_stop_with_parent if LIBC is not None else None,
            )

    def poll(self) -> Ended | None:
        """How it ended, or None while it runs."""
        pid, status, usage = os.wait4(self._popen.pid, os.WNOHANG)
        if pid == 0:
            return None
        self._popen.returncode = code = os.waitstatus_to_exitcode(status)
        return Ended(code, time.monotonic() - self._began, usage.ru_maxrss * 1024)

    def stop(self) -> None:
        """Ask it to save and stop; ranks themselves, for DeepSpeed's launcher would kill them."""
        pids = [self._popen.pid]
        if self.cell.kind != "method" and self._processes > 1:
            pids = ranks_below(self._popen.pid) or pids
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def command(plan: Plan, cell: Cell, resources: Resources, slot: int = 0) -> list[str]:
    """The command of a cell in one of the jobs; writes down the recipe or the settings that it names."""
    asked = write_asked(plan, cell)
    if cell.kind == "method":
        words = ["evaluate", str(cell.folder), "--methods", cell.label, "--seed", str(cell.seed)]
        words += ["--output", str(method_file(plan, cell))]
        settings = settings_file(plan, cell)
        words += ["--method-settings", str(settings)] if settings is not None else []
        return [sys.executable, "-m", "dsmixer", *words]
    words = ["dsmixer", "train", "--config", str(asked)]
    if resources.processes == 1:
        return [sys.executable, "-m", *words]
    launcher = Path(sys.executable).with_name("deepspeed")
    found = str(launcher) if launcher.is_file() else shutil.which("deepspeed") or "deepspeed"
    flags = [*_where(resources, slot), "--master_port", str(_free_port())]
    return [found, *flags, "--no_local_rank", "--module", *words]


def _where(resources: Resources, slot: int) -> list[str]:
    """How many ranks, or on which GPUs: told a number, the launcher would ignore CUDA_VISIBLE_DEVICES."""
    chosen = _devices_of(resources, slot, dict(os.environ))
    if chosen:
        return ["--include", f"localhost:{chosen}"]
    return ["--num_accelerators", str(resources.processes)]


def check_resources(resources: Resources) -> None:
    """Refuse cells of several ranks that would have to share GPUs, which NCCL can't do.

    Raises:
        UserError: there are fewer GPUs than ranks.
    """
    devices, ranks = _visible_devices(dict(os.environ)), resources.jobs * resources.processes
    if devices and resources.processes > 1 and ranks > len(devices):
        raise UserError(
            f"{resources.jobs} cells at once on {resources.processes} ranks each need {ranks} GPUs, and "
            f"there are {len(devices)}",
            where="--jobs, --processes",
            fix=f"write --jobs {max(1, len(devices) // resources.processes)}, or fewer --processes",
        )


def environment(resources: Resources, slot: int) -> dict[str, str]:
    """This process's, without a rank; threads and GPUs are shared out where several cells run at once."""
    own = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    at_once = resources.jobs * resources.processes
    if at_once > 1:
        own.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    chosen = _devices_of(resources, slot, own)
    if chosen:
        own["CUDA_VISIBLE_DEVICES"] = chosen
    return own


def _devices_of(resources: Resources, slot: int, variables: dict[str, str]) -> str:
    """The GPUs of one of several cells, with commas; empty where there are none, or one cell has all."""
    devices = _visible_devices(variables) if resources.jobs > 1 else []
    first = slot * resources.processes
    chosen = [devices[(first + n) % len(devices)] for n in range(resources.processes)] if devices else []
    return ",".join(dict.fromkeys(chosen))


def _visible_devices(variables: dict[str, str]) -> list[str]:
    said = variables.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name for name in said.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def ranks_below(pid: int) -> list[int]:
    """Processes below ``pid`` that a launcher has told their rank; not what those have started themselves."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        with contextlib.suppress(psutil.Error):  # one that has just ended
            for process in psutil.Process(waiting.pop()).children():
                (found if _is_rank(process) else waiting).append(process.pid)
    return found


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "LOCAL_RANK" in process.environ()
    return False


def _stop_with_parent() -> None:
    assert LIBC is not None
    LIBC.prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
