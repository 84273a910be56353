"""The losses on a router behind one interface, by name, and the plain auxiliary loss among them.

A loss is a frozen dataclass that is called on one router's micro-batch and answers a sum over its real
tokens, so that accumulation and the number of ranks do not change it. Another loss is one dataclass and
one line in ``routing_losses``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from dsmixer.losses.rsl import RoutingSpecializationLoss, micro_batch_usage
from dsmixer.routing.statistics import RouterOutput


class RoutingLoss(Protocol):
    """What the loop asks of a loss on a router."""

    @property
    def usage(self) -> str:
        """Which ``f`` of ``RoutingStatistics.usage`` it wants of the previous optimizer step."""

    @property
    def smooth_temperature(self) -> float:
        """tau of the ``smooth`` usage."""

    def __call__(self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float) -> torch.Tensor:
        """The loss summed over the micro-batch's real tokens, a scalar."""


@dataclass(frozen=True)
class SwitchLoss:
    """The auxiliary loss of Switch Transformers (arXiv 2101.03961, eq. 4).

        L = alpha * E * sum_i p_i f_i

    ``p_i`` is the mean probability of expert i over real tokens and ``f_i`` the share of tokens whose
    largest probability is i, a constant to the gradient. LoRA-Mixer's eq. 3 is the same without the
    factor E. MixLoRA (arXiv 2404.15159) counts all top-k hits instead, here ``usage="topk"`` up to K.

    Attributes:
        alpha: Switch's and MixLoRA's 0.01.
        usage: ``top1``, ``topk`` or ``smooth``, as in RSL.
        usage_from: ``previous_step`` or ``micro_batch``, as in RSL; Switch writes the latter.
        smooth_temperature: tau of ``smooth``.
    """

    alpha: float = 0.01
    usage: str = "top1"
    usage_from: str = "previous_step"
    smooth_temperature: float = 1.0

    def __call__(self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float) -> torch.Tensor:
        """``ramp * alpha * E * sum_x sum_i p_i(x) f_i``, a scalar; arguments as RSL's."""
        usage_E = previous_usage_E
        if self.usage_from == "micro_batch":
            usage_E = micro_batch_usage(output, self.usage, self.smooth_temperature)
        num_experts = output.p_TE.shape[1]
        balance = output.token_sum(output.p_TE) @ usage_E.detach().to(output.p_TE.dtype)
        return ramp * self.alpha * num_experts * balance


routing_losses: dict[str, Callable[..., RoutingLoss]] = {
    "rsl": RoutingSpecializationLoss,
    "switch": SwitchLoss,
}
