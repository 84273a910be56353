"""The machine's own resources: memory, shared memory, disk, open files."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

from dsmixer.placement.reason import amount
from dsmixer.training.machine.compiler import nearest_folder
from dsmixer.training.machine.finding import Finding, ok, problem, warning

SHARED_BUFFER = 69 * 10**6
"""Bytes of DeepSpeed's file in /dev/shm for each rank on a CPU."""

NCCL_SHARED = 2**30
"""Bytes of /dev/shm that NCCL and the workers of data loaders do well with."""

LEAST_FILES, FEW_FILES = 256, 1024
LEAST_DISK, LITTLE_DISK = 10**8, 5 * 10**9
LITTLE_MEMORY = 4 * 2**30
CGROUPS = Path("/sys/fs/cgroup")


def check_host(
    run_dir: Path, ranks: int, *, on_cpu: bool, needed: int | None, download: int
) -> list[Finding]:
    """Memory, shared memory, disks and open files.

    Args:
        run_dir: the recipe's ``run.dir``.
        ranks: of a run on this machine.
        on_cpu: whether they are on the CPU.
        needed: bytes that the run will leave in ``run_dir``; None: not known.
        download: bytes of weights that are still to be downloaded.
    """
    return [
        _memory(),
        _shared_memory(ranks, on_cpu),
        _disk("disk of run.dir", run_dir, needed, "set run.dir to a folder on another disk"),
        _disk(
            "disk of the hub cache", hub_cache(), download or None, "set HF_HOME to a folder on another disk"
        ),
        _open_files(),
    ]


def hub_cache() -> Path:
    """Where models and data sets of the hub are kept."""
    home = os.environ.get("HF_HOME") or Path(os.path.expanduser("~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def free_memory() -> tuple[int, str | None]:
    """Bytes that processes here can still take, and the control group whose limit says so, if one does."""
    free, limited = _available(), None
    for folder in _own_groups():
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is None:  # version 1
            limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
        if limit is not None and limit - (used or 0) < free:
            free, limited = max(limit - (used or 0), 0), str(folder)
    return free, limited


def _available() -> int:
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _own_groups() -> list[Path]:
    """The control groups of this process that may limit memory, and those around them."""
    folders = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUPS / controllers
        below = root / path.lstrip("/")
        folders += [below, *(folder for folder in below.parents if folder.is_relative_to(root))]
    return folders


def _number(file: Path) -> int | None:
    """The number in a file; None for a word such as ``max``, or without the file."""
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    """What is in a file of the system; nothing where this one does not have it."""
    try:
        return file.read_text()
    except OSError:
        return ""


def _memory() -> Finding:
    free, group = free_memory()
    found = f"{amount(free)} free" + (f", by the limit of the control group {group}" if group else "")
    if free < LITTLE_MEMORY:
        fix = "end other programs, or give this container or job more memory"
        return warning("memory", f"{found}; a rank's libraries alone take about 1 GB", fix)
    return ok("memory", found)


def _shared_memory(ranks: int, on_cpu: bool) -> Finding:
    fix = "give it more: docker run --shm-size=8g (or --ipc=host), or mount -o remount,size=8G /dev/shm"
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return problem("/dev/shm", f"{error.strerror}: ranks of one machine meet there", fix)
    needed = ranks * SHARED_BUFFER
    if on_cpu and free < needed:
        found = f"{amount(free)} free, and {ranks} ranks on the CPU take {amount(needed)}"
        return problem("/dev/shm", found, fix)
    if not on_cpu and ranks > 1 and free < NCCL_SHARED:
        return warning("/dev/shm", f"{amount(free)} free, and NCCL may fail with less than 1 GB", fix)
    room = f", room for {free // SHARED_BUFFER} ranks of DeepSpeed on the CPU" if on_cpu else ""
    return ok("/dev/shm", f"{amount(free)} free{room}")


def _disk(check: str, folder: Path, needed: int | None, elsewhere: str) -> Finding:
    """Whether the folder, or where it will be made, takes a file, and has the space."""
    there = folder
    try:
        there = nearest_folder(folder)
        free = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return problem(
            check, f"{there} can't be written: {error.strerror}", f"make it writable, or {elsewhere}"
        )
    found = f"{amount(free)} free in {there}"
    if needed is not None:
        found += f", {amount(needed)} needed"
    if free < max(LEAST_DISK, needed or 0):
        return problem(check, found, f"free some space, or {elsewhere}")
    if free < LITTLE_DISK and needed is None:
        return warning(
            check, f"{found}: little for a model or its checkpoints", f"free some space, or {elsewhere}"
        )
    return ok(check, found)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FEW_FILES:
        return ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"{soft} a process")
    fix = f"ulimit -n {'65536' if hard == resource.RLIM_INFINITY else hard} (hard limit: {hard})"
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        fix = "raise nofile in /etc/security/limits.conf, or docker run --ulimit nofile=65536"
    make = problem if soft < LEAST_FILES else warning
    return make("open files", f"{soft} a process: ranks hold connections, data and checkpoints open", fix)
