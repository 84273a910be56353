"""Where this rank's training loop stands: written by the loop, read by the thread that watches over it."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from dsmixer.training.world import limit_collectives

MEDIAN_OF = 51
WAITING_IN = ("torch.distributed", "deepspeed.comm")
INNERMOST_FRAMES = 3


@dataclass(frozen=True)
class Place:
    """Where a rank stands.

    Attributes:
        stage: 1 or 2; 0 outside the loops.
        step: the optimizer step in work, from 1.
        mark: phases entered so far in this process, so that later is larger.
        phase: what the rank is doing, in words.
        saving: whether it writes a checkpoint, which may take far longer than a step.
        median: of the seconds of the last steps.
        longest_save: seconds of the longest save of this process.
    """

    stage: int = 0
    step: int = 0
    mark: int = 0
    phase: str = "setting up"
    saving: bool = False
    median: float = 0.0
    longest_save: float = 0.0

    def text(self) -> str:
        """``in step 5 of stage 1 (reading its batch)``."""
        if not self.stage:
            return f"outside the training loop ({self.phase})"
        return f"in step {self.step} of stage {self.stage} ({self.phase})"


class Pulse:
    """The place of this rank. A place is replaced as a whole, so the other thread never sees half of one.

    Attributes:
        place: where the rank stands.
        begun: whether everything is set up, so that what the user gave was found good.
        limit: how long a collective may take; groups that DeepSpeed opens for a stage are given it, too.
    """

    def __init__(self, limit: timedelta | None = None) -> None:
        self.place = Place()
        self.limit = limit
        self.begun = False
        self._seconds: deque[float] = deque(maxlen=MEDIAN_OF)

    @contextmanager
    def inside(self, stage: int) -> Iterator[None]:
        """The loop of a stage; after an error the place stays where it was."""
        self._seconds.clear()
        self.give_time()
        self._move(stage=stage, step=0, phase="starting", median=0.0)
        yield
        self._move(stage=0, step=0, phase="after the loop", median=0.0)

    def give_time(self) -> None:
        """Set the limit of the collectives in all groups that there are now."""
        if self.limit is not None:
            limit_collectives(self.limit)

    def begin_step(self, step: int) -> None:
        """Optimizer step ``step``, from 1."""
        self._move(step=step, phase="reading its batch")

    def end_step(self, seconds: float) -> None:
        """The step took this long."""
        self._seconds.append(seconds)
        self._move(phase="writing the log", median=statistics.median(self._seconds))

    def enter(self, phase: str) -> None:
        """The next phase of the step."""
        self._move(phase=phase)

    @contextmanager
    def saving(self, folder: str) -> Iterator[None]:
        """While a checkpoint is written into a folder."""
        began = time.monotonic()
        self._move(phase=f"saving to {folder}", saving=True)
        try:
            yield
        finally:
            longest = max(self.place.longest_save, time.monotonic() - began)
            self._move(phase="saved", saving=False, longest_save=longest)

    def _move(
        self,
        *,
        phase: str,
        stage: int | None = None,
        step: int | None = None,
        saving: bool | None = None,
        median: float | None = None,
        longest_save: float | None = None,
    ) -> None:
        was = self.place
        self.place = Place(
            stage=was.stage if stage is None else stage,
            step=was.step if step is None else step,
            mark=was.mark + 1,
            phase=phase,
            saving=was.saving if saving is None else saving,
            median=was.median if median is None else median,
            longest_save=was.longest_save if longest_save is None else longest_save,
        )


def collectives_begun() -> int:
    """How many collectives of the whole world this rank has begun: a rank that waits in one is further on
    than the one it waits for."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0
    group = dist.group.WORLD
    assert group is not None
    return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]


def waits_in_collective() -> bool:
    """Whether the main thread stands in a collective, as far as its Python frames show."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    for _ in range(INNERMOST_FRAMES):
        if frame is None:
            return False
        if str(frame.f_globals.get("__name__", "")).startswith(WAITING_IN):
            return True
        frame = frame.f_back
    return False
