"""What a system is to the bench. No import beyond the standard library: it is read in every environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    pass


def _absent(*args: object) -> tuple[float, float]:
    raise NotImplementedError("built for the other kind of work")


@dataclass
class Built:
    """A system with a case's shapes, ready to work.

    Attributes:
        trained: weights that train.
        train_step: a whole step by its number: forward, backward, clipping, optimizer, gradients dropped;
            gives the loss (nats a target token) and the norm of the gradient before clipping.
        decode_token: one more token for each row, greedily.
        close: give up what does not go by itself.
    """

    trained: int
    train_step: Callable[[int], tuple[float, float]] = _absent
    decode_token: Callable[[], None] = _nothing
    close: Callable[[], None] = _nothing
