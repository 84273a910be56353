"""How many weights a mixture has, and how many of them are new: the figures of the paper's Table 17."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dsmixer.model.inject import Mixture


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights.

    Attributes:
        base: the frozen model without what was added.
        experts: the pairs A, B of all experts, without rows that only pad a smaller rank.
        routers: the routers' G.
    """

    base: int
    experts: int
    routers: int

    @property
    def added(self) -> int:
        """What the mixers brought."""
        return self.experts + self.routers

    @property
    def added_share(self) -> float:
        """Added weights as a share of base and added ones, 0 to 1: "trainable" in the paper."""
        return self.added / (self.base + self.added)

    @property
    def router_share(self) -> float:
        """Router weights as a share of the base alone, 0 to 1."""
        return self.routers / self.base


def _num_weights(parameter: nn.Parameter) -> int:
    # a weight in 4 bits has several in each element, and knows how many it was made of
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return int(packed.shape.numel())
    # a parameter that ZeRO-3 has partitioned is empty here and knows its whole size
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def count_weights(mixture: Mixture) -> WeightCounts:
    """Count a mixture's weights; they may lie on the meta device or be partitioned by ZeRO-3.

    A weight that two modules share, such as tied embeddings, counts once.
    """
    added = {id(p) for _, p in (*mixture.expert_parameters(), *mixture.router_parameters())}
    base = sum(_num_weights(p) for p in mixture.model.parameters() if id(p) not in added)
    experts = sum(mixer.bank.num_weights() for mixer in mixture.mixers.values())
    routers = sum(_num_weights(p) for _, p in mixture.router_parameters())
    return WeightCounts(base, experts, routers)
