"""Files that appear whole or not at all, and the flushing that a promise to survive a power cut takes."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_text(path: Path, text: str) -> None:
    """The whole text under this name, or the file as it was.

    Raises:
        OSError: it can't be written; nothing is left behind.
    """
    make_folder(path.parent)
    building = path.with_name(f".{path.name}.part")
    try:
        with building.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(building, path)
    except OSError:
        with suppress(OSError):
            building.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_json(path: Path, value: Any, *, indent: int | None = 1, allow_nan: bool = False) -> None:
    """JSON and a newline, whole or not at all.

    Raises:
        OSError: it can't be written.
        ValueError: a number is not finite, and ``allow_nan`` is not set: JSON has no such number.
    """
    write_text(path, json.dumps(value, indent=indent, allow_nan=allow_nan) + "\n")


def make_folder(path: Path) -> None:
    """A folder with those above it, each flushed into the one that it is in; nothing where it is there.

    Raises:
        OSError: it can't be made.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """``flush`` everything below a folder, and the folder."""
    for directory, _, files in os.walk(folder):
        for name in files:
            flush(Path(directory) / name)
        flush(Path(directory))


def as_os_error(error: OSError | SafetensorError, place: Path) -> OSError:
    """The system's error behind one of safetensors, which keeps its number only in the text."""
    if isinstance(error, OSError):
        return error if error.filename else OSError(error.errno, error.strerror, str(place))
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number), str(place))
