"""Experts that join a pool speak on their own domain and stay out of the choice elsewhere.

Shapes: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dsmixer.losses.interface import NOTHING, Extras, PlainLoss
from dsmixer.routing.statistics import RouterOutput


@dataclass(frozen=True)
class SupervisedMarginLoss(PlainLoss):
    """Hinges on the logits of the experts whose rows train; ours, for an expert added to a pool.

        own domain:  max(0, margin + max_{j != y} z_j - z_y)       y: the expert of the token's domain
        elsewhere:   max(0, margin + z_e - z_(K))                  for each expert e != y whose row trains

    ``z_(K)`` is the K-th largest logit of the experts whose rows do not train (the least, where they are
    fewer). Below it e is not among the K chosen, and under ``topk`` with renormalised weights what the token
    gets is bit for bit what it got without e; other modes give every probability its part. A cross-entropy
    pulls for ever on tokens that are right already, and is content with a small probability, which is often
    enough for a place among the K; a hinge is nought where nothing is lost.

    Where all rows train there is nothing to stay below, and the first line alone is left: the multiclass
    hinge of Crammer and Singer (2001). A token without a label (-1) adds nothing, and still counts in the
    mean over real tokens and routers. One number a token: exact in any layout.

    Attributes:
        weight: of the whole loss; 50, as of the supervised gate.
        margin: nats between the logits.
        own: weight of the first line against the second.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels_T"})

    weight: float = 50.0
    margin: float = 1.0
    own: float = 1.0

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        labels_T, logits_TE, trained_E = extras.labels_T, output.logits_TE, extras.trained_E
        assert labels_T is not None, "a supervised margin without labels"
        if trained_E is None:
            trained_E = torch.ones(logits_TE.shape[1], dtype=torch.bool, device=logits_TE.device)
        is_own_TE = torch.arange(logits_TE.shape[1], device=logits_TE.device) == labels_T[:, None]
        best_T = logits_TE.masked_fill(is_own_TE, -torch.inf).amax(1)
        missed_TE = torch.relu(self.margin + best_T[:, None] - logits_TE)
        floor_T = _floor(logits_TE, trained_E, output.choice.indices_TK.shape[1])
        intruding_TE = torch.relu(self.margin + logits_TE - floor_T[:, None])
        cost_TE = torch.where(is_own_TE, self.own * missed_TE, intruding_TE) * trained_E
        return ramp * self.weight * output.token_sum(cost_TE.sum(1) * (labels_T >= 0))


def _floor(logits_TE: torch.Tensor, trained_E: torch.Tensor, top_k: int) -> torch.Tensor:
    """The K-th largest logit of the experts whose rows stay, ``[T]``; infinite where there is none."""
    staying_TE = logits_TE.detach().masked_fill(trained_E, -torch.inf)
    sorted_TE = staying_TE.sort(dim=1, descending=True).values
    num_staying = (~trained_E).sum()
    last = (num_staying.clamp_max(top_k) - 1).clamp_min(0)
    floor_T = sorted_TE.index_select(1, last[None])[:, 0]
    return torch.where(num_staying > 0, floor_T, torch.inf)
