"""What a mixture is compared with and has itself: its base, one expert for all domains, and the mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsmixer.baselines.interface import Fitted, Given
from dsmixer.evaluation.methods import routed_as


@dataclass(frozen=True)
class Routed:
    """The model as ``evaluation.methods.routed_as`` routes it; told nothing, so one expert answers all.

    Attributes:
        method: ``base``, ``mixture`` or ``expert:NAME``.
    """

    trains: ClassVar[bool] = False

    method: str

    def __call__(self, given: Given) -> Fitted:
        """Nothing to make; arguments as ``Method``."""
        return Fitted(lambda _: routed_as(given.mixture.model, self.method))
