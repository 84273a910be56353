"""The sum of losses that a method puts on its routers, and what methods have published.

Shapes: N terms, M routers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch

from dsmixer.losses.aesl import AeslOrthogonalityLoss, AeslVarianceLoss
from dsmixer.losses.auxiliary import MixLoraLoss, SwitchLoss
from dsmixer.losses.gmoe import GmoeNormalLoss, GmoePoissonLoss
from dsmixer.losses.interface import NOTHING, Extras, OutputLoss, PerToken, RoutingLoss
from dsmixer.losses.mean_entropy import MoleBalanceLoss, MutualInformationLoss
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.losses.supervised_gate import SupervisedGateLoss
from dsmixer.losses.token_losses import TsallisEntropyLoss
from dsmixer.losses.usage import previous_usage
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics


@dataclass(frozen=True)
class RoutingTerms:
    """Several losses as one, each with the usage of the previous step that it wants; none is a loss of 0.

    Raises:
        ValueError: two terms want a smooth usage at different temperatures.
    """

    terms: tuple[RoutingLoss, ...]

    def __post_init__(self) -> None:
        found = {term.smooth_temperature for term in self.terms if term.usage == "smooth"}
        if len(found) > 1:
            raise ValueError(
                f"routing losses want a smooth usage at the temperatures {sorted(found)}; "
                "a step counts it at one: give them the same smooth_temperature"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Fields of ``Extras`` that some term can't do without."""
        return frozenset(chain.from_iterable(term.needs for term in self.terms))

    @property
    def on_outputs(self) -> tuple[OutputLoss, ...]:
        """The terms on what experts put out, which ``of_outputs`` adds up."""
        return tuple(term for term in self.terms if isinstance(term, OutputLoss))

    @property
    def smooth_temperature(self) -> float | None:
        """For ``RoutingStatistics``; None: no term wants a smooth usage."""
        return next((term.smooth_temperature for term in self.terms if term.usage == "smooth"), None)

    def learned(self, num_experts: int) -> dict[str, float]:
        """Parameters of all terms, by name, with their first values."""
        return dict(chain.from_iterable(term.learned(num_experts).items() for term in self.terms))

    def first_usage(
        self, num_routers: int, num_experts: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """What stands for the usage before the first step, 1/E, ``[N, M, E]``."""
        shape = (len(self.terms), num_routers, num_experts)
        return torch.full(shape, 1.0 / num_experts, device=device)

    def next_usage(self, statistics: RoutingStatistics) -> torch.Tensor:
        """The usages of a step, ``[N, M, E]``, from its reduced statistics."""
        shape = (0, statistics.num_routers, statistics.num_experts)
        usages = [previous_usage(statistics, t.usage, pooled=t.pooled) for t in self.terms]
        return torch.stack(usages) if usages else statistics.p_ME.new_zeros(shape)

    def __call__(
        self, output: RouterOutput, previous_usage_NE: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """The terms' sum on one router; ``previous_usage_NE`` is the router's part of the usages.

        Terms on experts' outputs are left out where ``extras`` has none of these.
        """
        apart = self.on_outputs if extras.outputs_TKO is None else ()
        pairs = [(t, u) for t, u in zip(self.terms, previous_usage_NE, strict=True) if t not in apart]
        losses = [term(output, usage_E, ramp, extras) for term, usage_E in pairs]
        return torch.stack(losses).sum() if losses else output.p_TE.new_zeros(())

    def of_outputs(self, summed: Callable[[PerToken], torch.Tensor], ramp: float) -> torch.Tensor:
        """The terms on the outputs of one mixer's experts, summed over real tokens.

        Args:
            summed: adds one number a token up over the mixer's real tokens.
            ramp: as in ``RoutingLoss``.
        """
        losses = [ramp * term.weight * summed(term.per_token) for term in self.on_outputs]
        return torch.stack(losses).sum()


published: dict[str, tuple[RoutingLoss, ...]] = {
    "lora_mixer": (RoutingSpecializationLoss(),),
    "switch": (SwitchLoss(),),
    "mixlora": (MixLoraLoss(),),
    "ds_moe": (MutualInformationLoss(),),
    "gmoe": (GmoePoissonLoss(), GmoeNormalLoss()),
    "aesl": (SwitchLoss(alpha=1e-3), AeslOrthogonalityLoss(), AeslVarianceLoss()),
    "mole": (MoleBalanceLoss(),),
    "meteora": (SupervisedGateLoss(),),
    "dynmole": (SwitchLoss(alpha=1e-3), TsallisEntropyLoss()),
}
"""The terms of methods by name, at their own coefficients where these are known. DynMoLE's weight of
Switch's term, 0.001, is that of a public re-implementation, which has another q (1.1, not 1.4)."""
