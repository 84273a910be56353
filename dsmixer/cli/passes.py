"""Progress of passes over held-out rows: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

EVERY_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Passes:
    """Counts batches, on standard error.

    Args:
        stream: standard error if None.
        clock: seconds, from any origin.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._bar: tqdm | None = None
        self._what, self._done, self._total, self._said_at = "", 0, 0, 0.0

    @contextmanager
    def of(self, what: str, total: int) -> Iterator[None]:
        """What is counted within.

        Args:
            what: such as ``scoring 8 layers by path``.
            total: batches that it takes at most.
        """
        from dsmixer.training.telling import lossy

        stream = lossy(sys.stderr if self._stream is None else self._stream)
        self._what, self._done, self._total, self._said_at = what, 0, total, self._clock()
        if stream.isatty():
            self._bar = tqdm(total=total, desc=what, unit="batch", file=stream, dynamic_ncols=True)
        else:
            self._say(f"{what}: {total} batches")
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()
            self._bar = None

    def tick(self) -> None:
        """A batch is done."""
        self._done += 1
        now = self._clock()
        if self._bar is not None:
            self._bar.update()
        elif now - self._said_at >= EVERY_SECONDS:
            self._said_at = now
            self._say(f"{self._what}: batch {self._done} of {self._total}")

    def _say(self, text: str) -> None:
        from dsmixer.training.telling import tell

        tell(text, sys.stderr if self._stream is None else self._stream)
