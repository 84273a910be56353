"""Lines for people, which no run ends for: a log on a full disk, or whose reader is gone, loses them."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

REFUSED = (OSError, ValueError)
"""What a stream raises that can't take a line: of its device, or because it is closed."""


class Lossy:
    """A stream that swallows what can't be written to it. A full device gets what waits when it has room.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose, a text; its length."""
        with suppress(*REFUSED):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As far as the device takes it."""
        with suppress(*REFUSED):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lossy(stream: TextIO) -> TextIO:
    """The stream, for whoever writes to it and must not fail."""
    return cast(TextIO, Lossy(stream))


def tell(text: str, stream: TextIO | None = None) -> None:
    """Write a line and flush it, or lose it.

    Args:
        text: without the end of the line.
        stream: standard output if None.
    """
    out = Lossy(sys.stdout if stream is None else stream)
    out.write(f"{text}\n")
    out.flush()


def tell_problem(text: str) -> None:
    """A line ``dsmixer: …`` on standard error."""
    tell(f"dsmixer: {text}", sys.stderr)


def let_go(stream: TextIO) -> None:
    """Flush a standard stream for the last time; what it still refuses is given up, or the interpreter would
    try again at its end and change the exit code."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except ValueError:  # closed
        return
