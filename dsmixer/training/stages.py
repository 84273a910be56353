"""What the two stages differ in; everything else is the same loop.

Shapes: B rows, S positions, E experts, U units of the optimizer (experts, then all routers as one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dsmixer.config.stages import Stage2Config, StageConfig
from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.losses.rsl import RoutingSpecializationLoss, ramp_at
from dsmixer.losses.task import per_expert_weights
from dsmixer.model.inject import Mixture
from dsmixer.routing.context import BatchRouting, RouterLoss
from dsmixer.routing.modes import Routing
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics
from dsmixer.training.optimizer import StepPlan
from dsmixer.training.schedule import rate_share


class Stage(Protocol):
    """One stage of training, as the loop sees it."""

    number: int
    routing: Routing
    num_steps: int

    def start_step(self, step: int, batch: StepBatch) -> RoutingStatistics | None:
        """Get ready for a step; the statistics that its routers fill, if it has routers at work."""

    def batch_routing(self, micro: MicroBatch) -> BatchRouting:
        """What the mixers have to know about a micro-batch."""

    def token_weights(self, micro: MicroBatch) -> torch.Tensor | float:
        """Weight of each position's cross-entropy in the loss of the step, ``[B, S]`` or one number."""

    def router_loss(self) -> tuple[RouterLoss | None, float]:
        """The routers' loss summed over real tokens, and what the sum is multiplied by."""

    def plan(self, step: int, statistics: RoutingStatistics | None) -> StepPlan:
        """The optimizer step, from the reduced statistics."""

    def forget_step(self) -> None:
        """Take back what ``plan`` has kept of the step, which is skipped."""


def expert_lookup(expert_of_domain: Sequence[int], device: torch.device) -> torch.Tensor:
    """Expert of each domain, with -1 at the end, so that index -1 (padding) finds it."""
    return torch.tensor([*expert_of_domain, -1], dtype=torch.int64, device=device)


def _rates(config: StageConfig, step: int, num_steps: int) -> float:
    share = rate_share(step, num_steps, config.warmup_ratio, config.scheduler)
    return config.learning_rate * share


@dataclass
class HardStage:
    """Stage one: each token goes to its domain's expert with weight 1.

    An expert's gradient is the mean over its own target tokens of the step. The sampler has brought every
    token to a rank that holds its expert.

    ``expert_of_domain`` is the expert in the pool, ``place_of_domain`` its place among the ``num_here`` of
    this rank; both as ``expert_lookup`` makes them.
    """

    config: StageConfig
    num_steps: int
    num_experts: int
    expert_of_domain: torch.Tensor
    place_of_domain: torch.Tensor
    num_here: int
    number: int = 1
    routing: Routing = field(default_factory=lambda: Routing(mode="hard"))
    _targets_E: torch.Tensor = field(init=False)

    def start_step(self, step: int, batch: StepBatch) -> RoutingStatistics | None:
        self._check_homes(batch)
        experts = self.expert_of_domain[:-1].cpu()
        self._targets_E = torch.zeros(self.num_experts, dtype=torch.int64)
        self._targets_E.index_add_(0, experts, batch.target_tokens)
        return None

    def _check_homes(self, batch: StepBatch) -> None:
        places = self.place_of_domain.cpu()
        for micro in batch.micro_batches:
            domains = micro.domain_ids.unique()
            lost = domains[(places[domains] < 0) & (domains >= 0)]
            assert not len(lost), f"domains {lost.tolist()} on a rank without their experts"

    def batch_routing(self, micro: MicroBatch) -> BatchRouting:
        places_T = self.place_of_domain[micro.domain_ids].flatten()
        return BatchRouting(expert_ids_T=places_T, num_here=self.num_here)

    def token_weights(self, micro: MicroBatch) -> torch.Tensor | float:
        return per_expert_weights(self.expert_of_domain[micro.domain_ids], self._targets_E)

    def router_loss(self) -> tuple[RouterLoss | None, float]:
        return None, 0.0

    def plan(self, step: int, statistics: RoutingStatistics | None) -> StepPlan:
        rate = _rates(self.config, step, self.num_steps)
        reached_U = torch.cat((self._targets_E > 0, torch.tensor([False])))
        return StepPlan(rate, 0.0, reached_U)

    def forget_step(self) -> None:
        pass


@dataclass
class SoftStage:
    """Stage two: the routers choose, without labels; experts are frozen or held near their first values.

    The task loss and RSL are means over the step's target and real tokens. RSL takes the usage of the
    previous step, which ``usage`` keeps.
    """

    config: Stage2Config
    num_steps: int
    mixture: Mixture
    routing: Routing
    device: torch.device
    num_domains: int
    usage: torch.Tensor
    number: int = 2
    _step: int = 0
    _num_targets: int = 0
    _num_tokens: int = 0
    _usage_before: torch.Tensor | None = None

    @property
    def loss(self) -> RoutingSpecializationLoss:
        rsl = self.config.rsl
        return RoutingSpecializationLoss(
            alpha=rsl.alpha,
            entropy_weight=rsl.entropy_weight,
            entropy=rsl.entropy,
            usage=rsl.usage,
            usage_from=rsl.usage_from,
            smooth_temperature=rsl.smooth_temperature,
        )

    def start_step(self, step: int, batch: StepBatch) -> RoutingStatistics | None:
        self._step = step
        self._num_targets = max(1, int(batch.target_tokens.sum()))
        self._num_tokens = max(1, batch.real_tokens)
        smooth = self.config.rsl.usage == "smooth"
        return RoutingStatistics(
            num_routers=len(self.mixture.routers),
            num_experts=len(self.mixture.expert_names),
            num_domains=self.num_domains,
            device=self.device,
            smooth_temperature=self.config.rsl.smooth_temperature if smooth else None,
        )

    def batch_routing(self, micro: MicroBatch) -> BatchRouting:
        domains_T = micro.domain_ids.flatten()
        # examples from a source of the routers' own are real, yet of no domain
        known_T = domains_T.masked_fill(domains_T >= self.num_domains, -1)
        return BatchRouting(mask_T=(domains_T >= 0).float(), domains_T=known_T)

    def token_weights(self, micro: MicroBatch) -> torch.Tensor | float:
        return 1.0 / self._num_targets

    def router_loss(self) -> tuple[RouterLoss | None, float]:
        ramp = ramp_at(self._step, self.num_steps, self.config.rsl.ramp)
        loss, usage = self.loss, self.usage

        def per_router(output: RouterOutput, index: int) -> torch.Tensor:
            return loss(output, usage[index], ramp)

        return per_router, 1.0 / (self._num_tokens * len(self.mixture.routers))

    def plan(self, step: int, statistics: RoutingStatistics | None) -> StepPlan:
        assert statistics is not None
        self._usage_before, self.usage = self.usage, statistics.usage(self.config.rsl.usage).clone()
        rate = _rates(self.config, step, self.num_steps)
        router_peak = self.config.router_learning_rate or self.config.learning_rate
        reached_E = statistics.chosen_ME.sum(0).cpu() > 0
        if self.config.experts == "frozen":
            reached_E = torch.zeros_like(reached_E)
        return StepPlan(
            learning_rate=rate,
            router_learning_rate=rate / self.config.learning_rate * router_peak,
            reached=torch.cat((reached_E, torch.tensor([True]))),
            preserve_beta=self._preserve_beta(),
        )

    def forget_step(self) -> None:
        if self._usage_before is not None:
            self.usage = self._usage_before

    def _preserve_beta(self) -> torch.Tensor | None:
        preserve = self.config.preserve
        if self.config.experts == "frozen" or preserve.beta == 0.0:
            return None
        held = [preserve.experts == "all" or name in preserve.experts for name in self.mixture.expert_names]
        return torch.tensor([*held, False]).float() * preserve.beta
