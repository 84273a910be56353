"""What the loop asks of a loss on a router, and what it may tell it beside the router's own work.

A loss is a frozen dataclass whose fields are its settings, each with a default, so that a section of a
recipe can be made from it. It is called on one router's micro-batch and answers a sum over real tokens, to
be divided by the tokens of the whole step.

Two kinds are exact under any layout by themselves: sums of one number a token (z-loss, entropies,
cross-entropy). A loss that is a function F of a mean over all tokens (of p, of usage) is not; it is taken
as its tangent at a mean m that is known beforehand, ``sum_x F(m) + grad F(m) (u(x) - m)``, which is one
number a token again. With ``usage_from="previous_step"``, m is the all-reduced mean of the previous
optimizer step: exact under accumulation and on any number of ranks, and F's own gradient where the mean
does not move. With ``"micro_batch"``, m is the micro-batch's own mean: value and gradient are exactly those
of the published formula on that micro-batch, and depend on how the step is cut into micro-batches.

Shapes: T tokens, E experts, K experts a token, O output width of the projection, M routers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch

from dsmixer.routing.statistics import RouterOutput

Usage = Literal["topk", "top1", "smooth", "chosen", "mean_p"]
"""Means over tokens that a loss may want: ``topk`` the renormalised weight, ``top1`` first choices,
``smooth`` a softmax with a temperature, ``chosen`` choices of any rank (sum K), ``mean_p`` probabilities."""

UsageFrom = Literal["previous_step", "micro_batch"]


@dataclass(frozen=True)
class Extras:
    """What some losses read beside the router's output.

    Attributes:
        labels_T: the expert that each token's domain belongs to, -1 for none.
        outputs_TKO: what the chosen experts put out, before their weights and in the order of
            ``choice.indices_TK``, with their graph. In a run no router has them: see ``OutputLoss``.
        learned: parameters of losses, by name, each a scalar with a gradient.
        trained_E: whose rows of the router train, bool; None: all.
    """

    labels_T: torch.Tensor | None = None
    outputs_TKO: torch.Tensor | None = None
    learned: Mapping[str, torch.Tensor] = field(default_factory=dict)
    trained_E: torch.Tensor | None = None


NOTHING = Extras()


class RoutingLoss(Protocol):
    """A loss on routers."""

    needs: ClassVar[frozenset[str]]
    """Fields of ``Extras`` that it cannot do without."""

    pooled: ClassVar[bool]
    """Whether the usage it wants is the mean over all routers, instead of the router's own."""

    @property
    def usage(self) -> Usage:
        """Which mean over tokens it wants of the previous optimizer step."""

    @property
    def smooth_temperature(self) -> float:
        """tau of the ``smooth`` usage."""

    def learned(self, num_experts: int) -> dict[str, float]:
        """Parameters of the loss that train with the routers, by name, with their first values."""

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """The loss summed over the micro-batch's real tokens, a scalar.

        Args:
            output: the router's work on the micro-batch.
            previous_usage_E: the usage of the previous optimizer step; 1/E before the first.
            ramp: 0 to 1, how far the loss's weight has risen.
            extras: what ``needs`` names, and learned parameters.
        """


PerToken = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the outputs of a token's experts, ``[T, K, O]``, and which of them are chosen, ``[T, K]`` bool, to one
number a token, ``[T]``."""


@runtime_checkable
class OutputLoss(Protocol):
    """A routing loss that needs ``outputs_TKO``, as the mixers take it: they sum it over tokens themselves,
    so that the outputs of all tokens are never there at once."""

    @property
    def weight(self) -> float:
        """Of the loss."""

    def per_token(self, outputs_TKO: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """The loss of each token before its weight, ``[T]``."""


class PlainLoss:
    """What most losses answer: no extras, the router's own usage, and no temperature."""

    needs: ClassVar[frozenset[str]] = frozenset()
    pooled: ClassVar[bool] = False

    @property
    def usage(self) -> Usage:
        return "mean_p"

    @property
    def smooth_temperature(self) -> float:
        return 1.0

    def learned(self, num_experts: int) -> dict[str, float]:
        """None."""
        return {}
