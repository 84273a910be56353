"""The batch of the next step, made while this one runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from dsmixer.data.collate import StepBatch


class Ahead:
    """Gives the batch of a step and begins with that of the step behind it, in a thread.

    A batch for a GPU is put into pinned memory there, so that its copies do not hold up the host.

    Args:
        batch_of: a step's batch; it depends on the step alone, and is asked for one step at a time.
        num_steps: of the stage; none behind the last one is made.
        device: that trains.
    """

    def __init__(
        self, batch_of: Callable[[int], StepBatch], num_steps: int, device: torch.device | str
    ) -> None:
        self._batch_of, self._num_steps = batch_of, num_steps
        self._pins = torch.device(device).type == "cuda"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next batch")
        self._next: tuple[int, Future[StepBatch]] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> StepBatch:
        """The batch of a step. What went wrong with it is raised here."""
        made, self._next = self._next, None
        if made is None or made[0] != step:
            made = self._begin(step)
        batch = made[1].result()
        if step + 1 < self._num_steps:
            self._next = self._begin(step + 1)
        return batch

    def _begin(self, step: int) -> tuple[int, Future[StepBatch]]:
        return step, self._thread.submit(self._make, step)

    def _make(self, step: int) -> StepBatch:
        batch = self._batch_of(step)
        return batch.pinned() if self._pins else batch
