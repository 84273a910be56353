"""GMoE's two losses (LoRA experts with a graph router): a token's weights follow a Poisson distribution,
the load of the experts a normal one.

Each compares a target q over ranks i = 1..E with probabilities sorted from the largest, so that which
expert holds which rank is free. The paper writes KL(q||p), its released code ``sum_i q_i |log(q_i / p_i)|``:
both are 0 where p is q, only the first is a divergence in between; ``form`` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dsmixer.losses.interface import NOTHING, Extras, PlainLoss, Usage, UsageFrom
from dsmixer.losses.usage import FLOOR, tangent, usage_at, usage_weights
from dsmixer.routing.statistics import RouterOutput

Form = Literal["paper", "code"]

RATE, WIDTH = "gmoe_poisson_rate", "gmoe_normal_width"
LEAST_WIDTH = 0.1


def poisson_log_target(num_experts: int, rate: torch.Tensor) -> torch.Tensor:
    """``log q [E]``, ``q_i`` proportional to ``rate^i / i!`` for i = 1..E; it falls for a rate under 2."""
    i_E = torch.arange(1, num_experts + 1, device=rate.device, dtype=rate.dtype)
    return torch.log_softmax(i_E * rate.log() - torch.lgamma(i_E + 1), dim=0)


def normal_log_target(num_experts: int, width: torch.Tensor) -> torch.Tensor:
    """``log q [E]``, the density of N(E/2, width) at 1..E, normalised, from the largest."""
    i_E = torch.arange(1, num_experts + 1, device=width.device, dtype=width.dtype)
    log_E = torch.log_softmax(-(i_E - num_experts / 2).square() / (2 * width.square()), dim=0)
    return log_E.sort(descending=True).values


def _parameter(extras: Extras, name: str, fixed: float, like: torch.Tensor) -> torch.Tensor:
    learned = extras.learned.get(name)
    return (
        torch.full((), fixed, dtype=like.dtype, device=like.device) if learned is None else learned.to(like)
    )


@dataclass(frozen=True)
class GmoePoissonLoss(PlainLoss):
    """GMoE's Poisson distinction loss: each token's probabilities differ from one another.

        L = weight * mean_x KL(q || sorted p(x)),    q_i proportional to rate^i e^-rate / i!

    One number a token: exact in any layout. Least, 0, where every token's sorted p is q.

    ``extras.learned["gmoe_poisson_rate"]``, if given, takes the place of ``rate`` and gets a gradient; it is
    kept within [1, 2] (no gradient outside), as GMoE does.

    Attributes:
        weight: GMoE's 0.005.
        rate: where GMoE starts its learned one.
        form: ``paper`` KL, ``code`` the sum of absolute log ratios.
    """

    weight: float = 0.005
    rate: float = 1.5
    form: Form = "paper"

    def learned(self, num_experts: int) -> dict[str, float]:
        """The rate, as a parameter."""
        return {RATE: self.rate}

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        rate = _parameter(extras, RATE, self.rate, output.p_TE).clamp(1.0, 2.0)
        log_q_E = poisson_log_target(output.p_TE.shape[1], rate)
        log_p_TE = torch.log_softmax(output.logits_TE, dim=1).sort(dim=1, descending=True).values
        ratio_TE = log_q_E - log_p_TE
        ratio_TE = ratio_TE.abs() if self.form == "code" else ratio_TE
        return ramp * self.weight * output.token_sum((log_q_E.exp() * ratio_TE).sum(1))


@dataclass(frozen=True)
class GmoeNormalLoss(PlainLoss):
    """GMoE's normal balance loss: the load of the experts follows a bell over their ranks.

        L = weight * KL(q || sorted w),    w_i = mean over tokens of expert i's renormalised top-k weight,
                                           q the sorted, normalised density of N(E/2, width) at 1..E

    w gets the gradient through the weights of the chosen. It is a function of a mean, taken at its tangent
    in m: ``sum_i q_i (log q_i - log m_i) - q_i (w_i - m_i) / m_i``, q_i that of i's rank in m. An expert with
    m under ``FLOOR`` is pushed as at ``FLOOR``; one that no token chose has no weight to push. A wide bell
    is flat, so uniform load is the minimum only as width grows.

    ``extras.learned["gmoe_normal_width"]``, if given, takes the place of ``width`` (at least 0.1).

    Attributes:
        weight: GMoE's 8.
        width: standard deviation in ranks; None: E/2, where GMoE starts its learned one.
        form: ``paper`` KL, ``code`` the sum of absolute log ratios.
        usage_from: where m is from; GMoE takes the micro-batch.
    """

    weight: float = 8.0
    width: float | None = None
    form: Form = "paper"
    usage: Usage = "topk"
    usage_from: UsageFrom = "previous_step"

    def _width(self, num_experts: int) -> float:
        return num_experts / 2 if self.width is None else self.width

    def learned(self, num_experts: int) -> dict[str, float]:
        """The width, as a parameter."""
        return {WIDTH: self._width(num_experts)}

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        m_E = usage_at(output, previous_usage_E, self.usage_from, self.usage, self.smooth_temperature)
        num_experts = m_E.shape[0]
        width = _parameter(extras, WIDTH, self._width(num_experts), m_E).clamp_min(LEAST_WIDTH)
        rank_of_E = m_E.argsort(descending=True, stable=True).argsort()
        log_q_E = normal_log_target(num_experts, width)[rank_of_E]
        least_E = m_E.clamp_min(FLOOR)
        ratio_E = log_q_E - least_E.log()
        slope_E = -log_q_E.exp() / least_E
        if self.form == "code":
            slope_E, ratio_E = slope_E * ratio_E.sign(), ratio_E.abs()
        value = (log_q_E.exp() * ratio_E).sum()
        weights_TE = usage_weights(output, self.usage, self.smooth_temperature)
        return ramp * self.weight * tangent(output, weights_TE, m_E, value, slope_E)
