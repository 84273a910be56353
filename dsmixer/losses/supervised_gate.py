"""MeteoRA's loss on the gate, which is told the right expert: an upper bar for routers without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dsmixer.losses.interface import NOTHING, Extras, PlainLoss
from dsmixer.routing.statistics import RouterOutput


@dataclass(frozen=True)
class SupervisedGateLoss(PlainLoss):
    """The gate's cross-entropy in MeteoRA (arXiv 2405.13053), nats.

        L = weight * mean_x -log p_{label(x)}(x)

    The label is the expert of the token's domain. MeteoRA sums the cross-entropies of all gates; here, as
    for all losses on routers, it is the mean over routers and real tokens. A token without a label (-1)
    adds nothing, and still counts in the mean. One number a token: exact in any layout.

    Attributes:
        weight: MeteoRA's 50.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels_T"})

    weight: float = 50.0

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        labels_T = extras.labels_T
        assert labels_T is not None, "a supervised gate without labels"
        log_p_TE = torch.log_softmax(output.logits_TE, dim=1)
        missed_T = -log_p_TE.gather(1, labels_T.clamp_min(0)[:, None])[:, 0]
        return ramp * self.weight * output.token_sum(missed_T * (labels_T >= 0))
