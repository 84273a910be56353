"""Routing without routers' say: every token hears each expert with a weight that is always the same.

Shapes: M routers, T tokens, D input width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.routing.context import RoutingContext
from dsmixer.routing.modes import Routing
from dsmixer.routing.router import Router


class ConstantWeights(RoutingContext):
    """Stands in for a model's context.

    Args:
        weights_ME: what the experts weigh where each router is asked.
    """

    def __init__(self, weights_ME: torch.Tensor) -> None:
        super().__init__(weights_ME.shape[1], Routing(mode="uniform"))
        self.weights_ME = weights_ME.float()

    def assign(self, router: Router, index: int, x_TD: torch.Tensor, **_: Any) -> Assignment:
        """The same gate for all tokens."""
        gate_E = self.weights_ME[index].to(x_TD.device)
        return Assignment(self.num_experts, gate_TE=gate_E.expand(len(x_TD), -1))
