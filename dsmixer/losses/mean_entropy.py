"""Losses on the mean distribution over experts through its logarithm: DS-MoE's and MoLE's.

Both are functions of a mean over tokens, taken at its tangent (see interface.py). Where an expert's mean is
under ``FLOOR``, its logarithm and inverse are those of ``FLOOR``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dsmixer.losses.interface import NOTHING, Extras, PlainLoss, Usage, UsageFrom
from dsmixer.losses.usage import FLOOR, tangent, usage_at
from dsmixer.routing.statistics import RouterOutput


@dataclass(frozen=True)
class MutualInformationLoss(PlainLoss):
    """The loss of DS-MoE (arXiv 2404.05567): minus the mutual information of tokens and experts, nats.

        L = weight * (-H(mean_x p(x)) + mean_x H(p(x)))

    Between ``-weight * ln E`` (every token sure, the load even) and 0 (all tokens alike, whatever p).
    The first term's tangent in m is ``sum_i p_i ln m_i``, as p and m both sum to 1; the second term is one
    number a token.

    DS-MoE trains every expert on every token and is sparse only in use: in a recipe ``stage2.routing: soft``
    with ``stage2.inference_routing: topk``. The loss itself is the same in every mode.

    Attributes:
        weight: 4e-4, the middle of the values that DS-MoE reports for its models, about 2e-4 to 6e-4.
        usage_from: where m is from; DS-MoE takes the micro-batch.
    """

    weight: float = 4e-4
    usage_from: UsageFrom = "previous_step"

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        m_E = usage_at(output, previous_usage_E, self.usage_from, self.usage, self.smooth_temperature)
        log_E = m_E.clamp_min(FLOOR).log()
        negative_entropy = output.p_sum_E() @ log_E
        return ramp * self.weight * (negative_entropy + output.token_sum(output.entropy_T()))


@dataclass(frozen=True)
class MoleBalanceLoss(PlainLoss):
    """The gating balance loss of MoLE (arXiv 2404.13628).

        L = -alpha * log prod_i q_i = -alpha * sum_i log q_i,    q = mean over routers and tokens of
                                                                    softmax(z / tau)

    Least, ``alpha * E * ln E``, where q is uniform. MoLE's gate speaks once a block and its q is the mean
    over blocks; which tokens or examples it is a mean over, the paper leaves open: here all real tokens.
    A router sees no other router, so q of the previous step, pooled over routers, is the point of the
    tangent ``-sum_i (log m_i + (q_i - m_i) / m_i)``. ``micro_batch`` takes the router's own q: it is
    MoLE's with one gated block.

    MoLE learns tau. Here it is a setting: a router's ``G x`` learns its own scale.

    Attributes:
        alpha: MoLE's 0.5.
        usage_from: where m is from.
        smooth_temperature: tau.
    """

    pooled: ClassVar[bool] = True

    alpha: float = 0.5
    usage: Usage = "smooth"
    usage_from: UsageFrom = "previous_step"
    smooth_temperature: float = 1.0

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        m_E = usage_at(output, previous_usage_E, self.usage_from, self.usage, self.smooth_temperature)
        least_E = m_E.clamp_min(FLOOR)
        q_TE = torch.softmax(output.logits_TE / self.smooth_temperature, dim=1)
        return ramp * self.alpha * tangent(output, q_TE, m_E, -least_E.log().sum(), -1 / least_E)
