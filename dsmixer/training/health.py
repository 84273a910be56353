"""What stops a run in good order: a signal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch


class Stopped(Exception):
    """The run was asked to stop by a signal, and has saved."""


class StopRequest:
    """Set by SIGTERM and SIGINT; the loop looks at it once a step, on all ranks together.

    ``at_once`` makes the signal end the run where it stands, for the time after the last step.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at_once = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self.at_once:
            raise Stopped("stopped after training; everything trained is saved")

    def as_number(self, device: torch.device) -> torch.Tensor:
        """1 where this rank was asked to stop, else 0."""
        return torch.tensor(float(self.signal is not None), device=device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the two signals for a while."""
        before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
