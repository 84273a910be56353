"""The routing specialisation loss of LoRA-Mixer (arXiv 2507.00029, eq. 5, 9, 12).

    L_RSL = mean over routers of  alpha * sum_i p_i f_i  +  sigma * lambda * mean_x H(p(x))

``p_i`` is the mean probability of expert i over real tokens and gets the gradient; ``f_i`` is its mean
usage and is a constant. Everything here is a sum over tokens, to be divided by the tokens of the whole
step, so that accumulation and the number of ranks do not change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dsmixer.losses.interface import NOTHING, Extras, PlainLoss, Usage, UsageFrom
from dsmixer.losses.usage import usage_at
from dsmixer.routing.statistics import RouterOutput

ENTROPY_SIGNS = {"specialize": 1.0, "paper_eq5": -1.0}


@dataclass(frozen=True)
class RoutingSpecializationLoss(PlainLoss):
    """RSL of one router on one micro-batch, summed over its real tokens.

    Attributes:
        alpha: weight of the balance term.
        entropy_weight: lambda.
        entropy: ``specialize`` penalises the token entropy (sigma = +1), ``paper_eq5`` rewards it.
        usage: which ``f``: ``topk`` mean renormalised weight, ``top1`` frequency, ``smooth`` softmax.
        usage_from: ``previous_step`` takes the all-reduced usage of the last optimizer step, which keeps
            the loss linear in tokens; ``micro_batch`` counts the micro-batch itself, as the paper writes.
        smooth_temperature: tau of ``smooth``.
    """

    alpha: float = 0.1
    entropy_weight: float = 0.05
    entropy: Literal["specialize", "paper_eq5"] = "specialize"
    usage: Usage = "topk"
    usage_from: UsageFrom = "previous_step"
    smooth_temperature: float = 1.0

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp * (alpha * sum_x sum_i p_i(x) f_i + sigma * lambda * sum_x H(p(x)))``, a scalar.

        Args:
            output: the router's work on the micro-batch.
            previous_usage_E: ``f`` of the previous optimizer step; 1/E before the first.
            ramp: 0 to 1, how far alpha and lambda have risen.
            extras: not used.
        """
        usage_E = usage_at(output, previous_usage_E, self.usage_from, self.usage, self.smooth_temperature)
        balance = output.p_sum_E() @ usage_E
        entropy = output.token_sum(output.entropy_T())
        sign = ENTROPY_SIGNS[self.entropy]
        return ramp * (self.alpha * balance + sign * self.entropy_weight * entropy)


def ramp_at(step: int, num_steps: int, share: float) -> float:
    """How far alpha and lambda have risen at ``step`` (from 0): linear over ``share`` of the steps."""
    length = share * num_steps
    return 1.0 if length <= 0 else min(1.0, (step + 1) / length)
