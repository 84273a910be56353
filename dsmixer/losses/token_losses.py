"""Losses of one number a token, from logits and probabilities alone: exact in any layout as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsmixer.losses.interface import NOTHING, Extras, PlainLoss
from dsmixer.routing.statistics import RouterOutput


@dataclass(frozen=True)
class ZLoss(PlainLoss):
    """The router z-loss of ST-MoE (arXiv 2202.08906, eq. 5).

        L = weight * mean_x (log sum_i exp z_i(x))^2

    It keeps logits small. Least, 0, where ``sum_i exp z_i = 1``: whatever p is, a common shift gets there.

    Attributes:
        weight: ST-MoE's 0.001.
    """

    weight: float = 1e-3

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        return ramp * self.weight * output.token_sum(output.logits_TE.logsumexp(1).square())


@dataclass(frozen=True)
class TsallisEntropyLoss(PlainLoss):
    """The mean Tsallis entropy of a token's probabilities, which DynMoLE adds to Switch's loss.

        L = weight * mean_x (1 - sum_i p_i(x)^q) / (q - 1)

    0 where a token is sure, ``(1 - E^(1-q)) / (q - 1)`` where it is uniform; q = 1 is its limit, the
    Shannon entropy in nats. No unit otherwise.

    Attributes:
        weight: DynMoLE's 0.01; minimised, so a token grows sure.
        q: DynMoLE's 1.4. Above 1 the gradient stays finite where p is 0.
    """

    weight: float = 0.01
    q: float = 1.4

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        if self.q == 1.0:
            entropy_T = output.entropy_T()
        else:
            # the gradient of p^q at 0 is infinite for q < 1
            p_TE = output.p_TE.clamp_min(torch.finfo(output.p_TE.dtype).tiny)
            entropy_T = (1 - p_TE.pow(self.q).sum(1)) / (self.q - 1)
        return ramp * self.weight * output.token_sum(entropy_T)
