"""What stops a run in good order: a signal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch


class Stopped(BaseException):
    """The run was asked to stop by a signal, and everything trained is saved.

    It may be raised in the middle of a library's work, which must not take it for one of its errors.
    """


class StopRequest:
    """Set by SIGTERM and SIGINT; the loop looks at it once a step, on all ranks together.

    Attributes:
        signal: that came, if any; 0 after ``ask``.
        at_once: what to say where a signal ends the run on the spot, as before the run is begun and after
            its last step; empty while the loop has to save first.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at_once = ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self.at_once:
            raise Stopped(self.at_once)

    def ask(self) -> None:
        """The loop is to stop as after a signal; from any thread."""
        self.signal = 0

    def as_number(self, device: torch.device) -> torch.Tensor:
        """1 where this rank was asked to stop, else 0; filled on the device, so that nothing is copied."""
        return torch.full((), float(self.signal is not None), device=device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the two signals for a while."""
        before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
