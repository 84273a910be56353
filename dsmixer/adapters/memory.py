"""How much memory there is, asked before what a stranger's file declares is allocated."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsmixer.config.errors import UserError

MEMINFO = Path("/proc/meminfo")
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of this process's container, in the second and the first form of control groups."""
MORE_MEMORY = "use a machine with more memory, or another adapter"
_REFUSED = re.compile(r"allocate|not enough memory", re.IGNORECASE)


def available_bytes() -> int:
    """Bytes that can be allocated now: of the machine, and of the container that this runs in."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(MEMINFO), re.MULTILINE)
    free = [int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit, used in CGROUPS:
        texts = _text(Path(limit)).strip(), _text(Path(used)).strip()
        if all(text.isdecimal() for text in texts):
            free.append(max(0, int(texts[0]) - int(texts[1])))
    return min(free)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def check_memory(needed: int, where: str) -> None:
    """Refuse a file whose weights need more bytes than there are.

    Args:
        needed: bytes of all that is read of it.
        where: the file, for the message.

    Raises:
        UserError: with both numbers.
    """
    free = available_bytes()
    if needed > free:
        problem = f"its weights need {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free"
        raise UserError(problem, where=where, fix=MORE_MEMORY)


@contextmanager
def enough_memory(where: str) -> Iterator[None]:
    """Around what allocates: that it can't is the file's fault, not ours.

    Raises:
        UserError: an allocation was refused.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _REFUSED.search(str(error)):
            raise
        problem = "its weights need more memory than there is"
        raise UserError(problem, where=where, fix=MORE_MEMORY) from error
