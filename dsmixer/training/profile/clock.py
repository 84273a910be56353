"""A clock whose every instant belongs to exactly one part of a step, so that the parts add up to the step."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from deepspeed.accelerator import get_accelerator
from torch.profiler import record_function

REST = "loop"
SAVING, PROFILING = "saving", "profiling"
"""What is told apart: writing checkpoints, a share of ``loop``; what the profile itself takes, of no part."""

PARTS = ("base", "mixers", "router", "exchange", "optimizer", "data", REST)


class Ranges(Protocol):
    """What is told where a part begins and ends. Parts nest; the innermost one counts."""

    def enter(self, part: str, *, counts: bool = True) -> int:
        """Go over into a part; the depth to come back to."""

    def leave(self, depth: int) -> None:
        """Come back."""


class Clock:
    """Seconds and calls of each part of one step.

    On a CPU the time is the host's. On a device it is that of the stream that the step runs on, between
    events that are recorded there: what a kernel takes counts where it runs, not where the host has asked for
    it, and what the stream waits for the host, or for another stream, counts where it waits. The host waits
    for the device before a step and after it, and nowhere in it.

    Args:
        device: of the rank.
        now: the host's time, seconds from any origin.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._on_host = device.type == "cpu"
        self._stack: list[str] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._calls: Counter[str] = Counter()
        self._last = 0.0
        self._stream: Any = None
        self._events: list[Any] = []
        self._marks: list[str] = []

    def start(self) -> None:
        """Begin a step, in ``loop``."""
        self._stack, self._marks = [REST], []
        self._seconds, self._calls = defaultdict(float), Counter()
        if not self._on_host:
            get_accelerator().synchronize()
            self._stream = get_accelerator().current_stream()
            self._record(0)
        self._last = self._now()

    def stop(self) -> tuple[dict[str, float], dict[str, int]]:
        """End the step: seconds and calls by part."""
        self._mark(self._stack[-1])
        if not self._on_host:
            get_accelerator().synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            for part, (begun, ended) in zip(self._marks, pairs, strict=False):
                self._seconds[part] += begun.elapsed_time(ended) / 1000
        return dict(self._seconds), dict(self._calls)

    def enter(self, part: str, *, counts: bool = True) -> int:
        """See ``Ranges``. A part in itself is no new call, and in ``saving`` there are no others."""
        depth, here = len(self._stack), self._stack[-1]
        if here == SAVING:
            part = here
        if part != here:
            self._mark(here)
            self._calls[part] += counts
        self._stack.append(part)
        return depth

    def leave(self, depth: int) -> None:
        """See ``Ranges``."""
        here = self._stack[-1]
        del self._stack[depth:]
        if self._stack[-1] != here:
            self._mark(here)

    def _mark(self, part: str) -> None:
        """What has gone by since the last mark was this part's."""
        if self._on_host:
            now = self._now()
            self._seconds[part] += now - self._last
            self._last = now
        else:
            self._marks.append(part)
            self._record(len(self._marks))

    def _record(self, index: int) -> None:
        if index == len(self._events):
            self._events.append(get_accelerator().Event(enable_timing=True))
        self._events[index].record(self._stream)


class NamedRanges:
    """Names the parts in a trace of ``torch.profiler``."""

    def __init__(self) -> None:
        self._open: list[record_function] = []

    def enter(self, part: str, *, counts: bool = True) -> int:
        """See ``Ranges``."""
        self._open.append(record_function(f"dsmixer: {part}"))
        self._open[-1].__enter__()
        return len(self._open) - 1

    def leave(self, depth: int) -> None:
        """See ``Ranges``."""
        while len(self._open) > depth:
            self._open.pop().__exit__(None, None, None)
