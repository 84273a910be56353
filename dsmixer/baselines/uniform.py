"""What needs no training: the domain's own expert, and two averages of all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from dsmixer.baselines.interface import Fitted, Given
from dsmixer.baselines.merged import concatenated, factor_sum
from dsmixer.model.inject import route_to


@dataclass(frozen=True)
class Own:
    """A single LoRA a task: the expert of the domain that is asked, and so told the domain.

    What a mixture, which is told nothing, can at best hope to recover.
    """

    trains: ClassVar[bool] = False

    def __call__(self, given: Given) -> Fitted:
        """Nothing to make; arguments as ``Method``."""
        mixture = given.mixture
        return Fitted(partial(route_to, mixture.model), told=frozenset(mixture.expert_names))


@dataclass(frozen=True)
class Uniform:
    """The average of the experts' outputs, which is that of their products: ``sum_e (s_e / E) B_e A_e``."""

    trains: ClassVar[bool] = False

    def __call__(self, given: Given) -> Fitted:
        """As one LoRA of rank ``sum_e R_e``; arguments as ``Method``."""
        num = len(given.mixture.expert_names)
        merged = concatenated(given.mixture, [1 / num] * num)
        return Fitted(lambda _: merged.under(given.mixture), merged=merged)


@dataclass(frozen=True)
class UniformFactors:
    """The average of the A and of the B separately, with the cross terms ``B_i A_j`` that it makes."""

    trains: ClassVar[bool] = False

    def __call__(self, given: Given) -> Fitted:
        """As one LoRA of the experts' rank; arguments as ``Method``.

        Raises:
            UserError: the ranks differ.
        """
        num = len(given.mixture.expert_names)
        merged = factor_sum(given.mixture, [1 / num] * num)
        return Fitted(lambda _: merged.under(given.mixture), merged=merged)
