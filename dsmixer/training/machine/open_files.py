"""Which files processes of this user have open."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def is_open(path: Path) -> bool:
    """Whether a process of this user has the file open, as the one that builds an op does with its lock."""
    wanted = os.path.realpath(path)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link) == wanted:
                return True
    return False
