"""Losses of load balance: mean probability times usage, and its quadratic form.

In all of them ``p_i`` is the mean probability of expert i over real tokens, and ``f_i`` its usage, a
constant to the gradient. ``f`` and the quadratic form's point are means over tokens; ``usage_from`` says
of which tokens (see interface.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dsmixer.losses.interface import NOTHING, Extras, PlainLoss, Usage, UsageFrom
from dsmixer.losses.usage import tangent, usage_at
from dsmixer.routing.statistics import RouterOutput


@dataclass(frozen=True)
class SwitchLoss(PlainLoss):
    """The auxiliary loss of Switch Transformers (arXiv 2101.03961, eq. 4).

        L = alpha * E * sum_i p_i f_i

    ``f_i`` is the share of tokens whose largest probability is i. Its least value over p = f is alpha, at
    1/E; for another f it is linear in p.

    Attributes:
        alpha: Switch's and MixLoRA's 0.01.
        usage: ``top1``, ``topk`` or ``smooth``, as in RSL; ``chosen`` and ``mean_p`` too.
        usage_from: ``previous_step`` or ``micro_batch``; Switch writes the latter.
        smooth_temperature: tau of ``smooth``.
    """

    times_experts: ClassVar[bool] = True

    alpha: float = 0.01
    usage: Usage = "top1"
    usage_from: UsageFrom = "previous_step"
    smooth_temperature: float = 1.0

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp * alpha * E * sum_x sum_i p_i(x) f_i``, a scalar; arguments as ``RoutingLoss``."""
        usage_E = usage_at(output, previous_usage_E, self.usage_from, self.usage, self.smooth_temperature)
        scale = self.alpha * (output.p_TE.shape[1] if self.times_experts else 1)
        return ramp * scale * (output.p_sum_E() @ usage_E)


@dataclass(frozen=True)
class AuxiliaryLoss(SwitchLoss):
    """The plain auxiliary loss of LoRA-Mixer (arXiv 2507.00029, eq. 3): Switch's without its factor E.

        L = alpha * sum_i p_i f_i

    Attributes:
        alpha: 0.1, the weight that the same term has in RSL.
    """

    times_experts: ClassVar[bool] = False

    alpha: float = 0.1


@dataclass(frozen=True)
class MixLoraLoss(SwitchLoss):
    """The auxiliary loss of MixLoRA (arXiv 2404.15159), as its code has it.

        L = alpha * E * sum_i p_i f_i,    f_i: tokens that have i among their K, so sum_i f_i = K

    Its code pools the logits of all layers before it takes means: f is the mean over all routers here, and
    p_i becomes that mean by the mean over routers. With ``usage_from="micro_batch"`` f is the router's own,
    as a router sees no other in one micro-batch: that is not MixLoRA's.

    Attributes:
        alpha: 0.01 as in its README; its code has 0.001.
    """

    pooled: ClassVar[bool] = True

    usage: Usage = "chosen"


@dataclass(frozen=True)
class QuadraticLoss(PlainLoss):
    """The quadratic form of the auxiliary loss (LoRA-Mixer, arXiv 2507.00029, eq. 21).

        L = alpha * sum_i p_i^2

    Here p gets the gradient in both factors, and the only minimiser is uniform (eq. 23): alpha / E. The
    tangent at m is ``alpha * (sum_i 2 m_i p_i - m_i^2)``.

    Attributes:
        alpha: 0.1, as in eq. 3.
        usage_from: where m is from, the step before or the micro-batch itself.
    """

    alpha: float = 0.1
    usage_from: UsageFrom = "previous_step"

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        m_E = usage_at(output, previous_usage_E, self.usage_from, self.usage, self.smooth_temperature)
        return ramp * self.alpha * tangent(output, output.p_TE, m_E, m_E.square().sum(), 2 * m_E)
