"""What stops a run in good order: a signal, or numbers that are no longer finite."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from dsmixer.model.inject import Mixture
from dsmixer.training.world import World, gather_objects


class NonFiniteError(RuntimeError):
    """A loss or a gradient was infinite or not a number; nothing was updated with it."""


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


def refuse_nonfinite(
    world: World,
    mixture: Mixture,
    task_loss: float,
    squared_norms_U: torch.Tensor,
    micro_batches: list[tuple[str, torch.Tensor]],
) -> None:
    """Stop before the update where the step's loss or a gradient is not finite.

    All arguments but ``micro_batches`` are the same on every rank, so all ranks raise together.

    Args:
        world: the ranks.
        mixture: names the experts.
        task_loss: of the step, all ranks.
        squared_norms_U: squared gradient norms of experts and routers, all ranks.
        micro_batches: description and summed loss of each micro-batch of this rank.

    Raises:
        NonFiniteError: names the experts and examples.
    """
    bad = [i for i, norm in enumerate(squared_norms_U.tolist()) if not math.isfinite(norm)]
    if math.isfinite(task_loss) and not bad:
        return
    names = [*mixture.expert_names, "the routers"]
    own = [text for text, loss in micro_batches if not bool(torch.isfinite(loss))]
    examples = [text for texts in gather_objects(world, own) for text in texts]
    parts = [f"the loss of this step is {task_loss}"]
    if bad:
        parts.append(f"the gradient is not finite for {', '.join(names[i] for i in bad[:8])}")
    if examples:
        parts.append("the micro-batches with it held " + "; ".join(examples[:4]))
    raise NonFiniteError(
        ", ".join(parts) + ". Nothing was updated. Look at those examples, lower the learning rate, or "
        "use base.dtype=float32; the last checkpoint is intact."
    )
