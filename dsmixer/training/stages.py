"""What the two stages differ in; everything else is the same loop.

Shapes: B rows, S positions, E experts, U units of the optimizer (experts, then all routers as one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from dsmixer.config.stages import Stage2Config, StageConfig
from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.losses.choice import routing_terms
from dsmixer.losses.interface import Extras, PerToken
from dsmixer.losses.rsl import ramp_at
from dsmixer.losses.task import per_expert_weights
from dsmixer.losses.terms import RoutingTerms
from dsmixer.model.inject import Mixture
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.routing.context import BatchRouting, MixerLoss, RouterLoss, Stream
from dsmixer.routing.modes import Routing
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics
from dsmixer.training.optimizer import StepPlan
from dsmixer.training.rows import to_device
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

    def output_loss(self) -> MixerLoss | None:
        """A loss on what the experts of each mixer put out, a sum that is multiplied by the same."""

    def plan(self, step: int, statistics: RoutingStatistics | None) -> StepPlan:
        """The optimizer step, from the reduced statistics."""

    def forget_step(self) -> None:
        """Take back what ``plan`` has kept of the step, which is skipped."""


def expert_lookup(expert_of_domain: Sequence[int], device: torch.device) -> torch.Tensor:
    """Expert of each domain, with -1 at the end, so that index -1 (padding) finds it."""
    return torch.tensor([*expert_of_domain, -1], dtype=torch.int64, device=device)


def routing_in_training(config: Stage2Config, mixer: MixerConfig) -> Routing:
    """How stage two routes, which the mixture that comes of it need not."""
    return replace(mixer.default_routing(), mode=config.routing)


def _rates(config: StageConfig, step: int, num_steps: int) -> float:
    share = rate_share(step, num_steps, config.warmup_ratio, config.scheduler)
    return config.learning_rate * share


@dataclass
class HardStage:
    """Stage one: each token goes to its domain's expert with weight 1.

    An expert's gradient is the mean over its own target tokens of the step. The sampler has brought every
    token to a rank that holds its expert.

    ``expert_of_domain`` is the expert in the pool, ``place_of_domain`` its place among the ``num_here`` of
    this rank; both as ``expert_lookup`` makes them. What a step asks of them on the host is copied once.
    """

    config: StageConfig
    num_steps: int
    num_experts: int
    expert_of_domain: torch.Tensor
    place_of_domain: torch.Tensor
    num_here: int
    number: int = 1
    routing: Routing = field(default_factory=lambda: Routing(mode="hard"))
    _experts: torch.Tensor = field(init=False)
    _places: torch.Tensor = field(init=False)
    _reached_U: torch.Tensor = field(init=False)
    _targets_E: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._experts, self._places = self.expert_of_domain[:-1].cpu(), self.place_of_domain.cpu()

    def start_step(self, step: int, batch: StepBatch) -> RoutingStatistics | None:
        self._check_homes(batch)
        targets_U = torch.zeros(self.num_experts + 1, dtype=torch.int64)
        targets_U.index_add_(0, self._experts, batch.target_tokens)
        self._reached_U = targets_U > 0
        self._targets_E = to_device(targets_U[:-1], self.expert_of_domain.device)
        return None

    def _check_homes(self, batch: StepBatch) -> None:
        for micro in batch.micro_batches:
            domains = micro.domain_ids.unique()
            lost = domains[(self._places[domains] < 0) & (domains >= 0)]
            assert not len(lost), f"domains {lost.tolist()} on a rank without their experts"

    def batch_routing(self, micro: MicroBatch) -> BatchRouting:
        encoder = None if micro.encoder is None else self._of_stream(micro.encoder.domain_ids)
        return self._of_stream(micro.domain_ids, encoder)

    def _of_stream(self, domain_ids: torch.Tensor, encoder: BatchRouting | None = None) -> BatchRouting:
        places_T = self.place_of_domain[domain_ids].flatten()
        return BatchRouting(expert_ids_T=places_T, num_here=self.num_here, encoder=encoder)

    def token_weights(self, micro: MicroBatch) -> torch.Tensor | float:
        return per_expert_weights(self.expert_of_domain[micro.domain_ids], self._targets_E)

    def router_loss(self) -> tuple[RouterLoss | None, float]:
        return None, 0.0

    def output_loss(self) -> MixerLoss | None:
        return None

    def plan(self, step: int, statistics: RoutingStatistics | None) -> StepPlan:
        rate = _rates(self.config, step, self.num_steps)
        return StepPlan(rate, 0.0, self._reached_U)

    def forget_step(self) -> None:
        pass


@dataclass
class SoftStage:
    """Stage two: the routers choose, without labels; experts are frozen or held near their first values.

    The task loss is a mean over the step's target tokens, each router's own loss one over the real tokens of
    its stream. The terms of that loss take the usage of the previous step, which ``usage`` ``[N, M, E]``
    keeps; None: 1/E. ``expert_of_domain``, as ``expert_lookup`` makes it, is for a loss that is told the
    right expert.
    """

    config: Stage2Config
    num_steps: int
    mixture: Mixture
    routing: Routing
    device: torch.device
    num_domains: int
    expert_of_domain: torch.Tensor
    usage: torch.Tensor | None = None
    number: int = 2
    terms: RoutingTerms = field(init=False)
    _step: int = 0
    _num_targets: int = 0
    _num_tokens: dict[Stream, int] = field(default_factory=dict)
    _usage_before: torch.Tensor | None = None
    _labels: dict[Stream, torch.Tensor | None] = field(default_factory=dict)
    _trained_E: torch.Tensor | None = None
    _preserve_beta_U: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._preserve_beta_U = self._preserve_beta()
        self.terms = routing_terms(self.config)
        shape = (len(self.mixture.routers), len(self.mixture.expert_names))
        if self.usage is None:
            self.usage = self.terms.first_usage(*shape)
        # that of one term has been saved without N
        self.usage = self.usage.view(len(self.terms.terms), *shape).to(self.device)
        if self.config.routers != "all":
            trained = [name in self.config.routers for name in self.mixture.expert_names]
            self._trained_E = torch.tensor(trained, device=self.device)

    def start_step(self, step: int, batch: StepBatch) -> RoutingStatistics | None:
        self._step = step
        self._num_targets = max(1, int(batch.target_tokens.sum()))
        of_streams: dict[Stream, int]
        of_streams = {"decoder": batch.real_tokens - batch.encoder_tokens, "encoder": batch.encoder_tokens}
        self._num_tokens = {stream: max(1, count) for stream, count in of_streams.items()}
        return RoutingStatistics(
            num_routers=len(self.mixture.routers),
            num_experts=len(self.mixture.expert_names),
            num_domains=self.num_domains,
            device=self.device,
            smooth_temperature=self.terms.smooth_temperature,
        )

    def batch_routing(self, micro: MicroBatch) -> BatchRouting:
        encoder = None if micro.encoder is None else self._of_stream(micro.encoder.domain_ids)
        routing = self._of_stream(micro.domain_ids, encoder)
        if "labels_T" in self.terms.needs:
            self._labels = {"decoder": self._label(routing), "encoder": self._label(encoder)}
        return routing

    def _label(self, routing: BatchRouting | None) -> torch.Tensor | None:
        known_T = None if routing is None else routing.domains_T
        return None if known_T is None else self.expert_of_domain[known_T]

    def _of_stream(self, domain_ids: torch.Tensor, encoder: BatchRouting | None = None) -> BatchRouting:
        domains_T = domain_ids.flatten()
        # examples from a source of the routers' own are real, yet of no domain
        known_T = domains_T.masked_fill(domains_T >= self.num_domains, -1)
        return BatchRouting(mask_T=(domains_T >= 0).float(), domains_T=known_T, encoder=encoder)

    def token_weights(self, micro: MicroBatch) -> torch.Tensor | float:
        return 1.0 / self._num_targets

    def router_loss(self) -> tuple[RouterLoss | None, float]:
        terms, usage_NME, streams, ramp = self.terms, self.usage, self.mixture.streams, self._ramp
        assert usage_NME is not None

        def per_router(output: RouterOutput, index: int) -> torch.Tensor:
            extras = Extras(labels_T=self._labels.get(streams[index]), trained_E=self._trained_E)
            found = terms(output, usage_NME[:, index], ramp, extras)
            return found if streams[index] == "decoder" else found * self._encoder_share

        return per_router, 1.0 / (self._num_tokens["decoder"] * len(self.mixture.routers))

    def output_loss(self) -> MixerLoss | None:
        terms, streams, ramp = self.terms, self.mixture.streams, self._ramp
        if not terms.on_outputs:
            return None
        # the sum is divided by the number of routers, and this is a mean over mixers
        share = len(self.mixture.routers) / len(self.mixture.mixers)

        def per_mixer(summed: Callable[[PerToken], torch.Tensor], index: int) -> torch.Tensor:
            found = share * terms.of_outputs(summed, ramp)
            return found if streams[index] == "decoder" else found * self._encoder_share

        return per_mixer

    @property
    def _ramp(self) -> float:
        return ramp_at(self._step, self.num_steps, self.config.rsl.ramp)

    @property
    def _encoder_share(self) -> float:
        """Losses are divided by the decoder's tokens: what makes a sum over the encoder's a mean."""
        return self._num_tokens["decoder"] / self._num_tokens["encoder"]

    def plan(self, step: int, statistics: RoutingStatistics | None) -> StepPlan:
        assert statistics is not None
        self._usage_before, self.usage = self.usage, self.terms.next_usage(statistics).clone()
        rate = _rates(self.config, step, self.num_steps)
        router_peak = self.config.router_learning_rate or self.config.learning_rate
        return StepPlan(
            learning_rate=rate,
            router_learning_rate=rate / self.config.learning_rate * router_peak,
            reached=self._reached(statistics),
            preserve_beta=self._preserve_beta_U,
        )

    def _reached(self, statistics: RoutingStatistics) -> torch.Tensor:
        """Of experts that train the host must know those that were chosen before it looks at their gradients,
        and waits for it; of frozen ones it asks nothing."""
        if self.config.experts == "frozen":
            chosen_E = torch.zeros(statistics.num_experts)
        else:
            chosen_E = statistics.chosen_ME.sum(0).cpu()
        return torch.cat((chosen_E > 0, torch.tensor([True])))

    def forget_step(self) -> None:
        if self._usage_before is not None:
            self.usage = self._usage_before

    def _preserve_beta(self) -> torch.Tensor | None:
        preserve = self.config.preserve
        if self.config.experts == "frozen" or preserve.beta == 0.0:
            return None
        held = [preserve.experts == "all" or name in preserve.experts for name in self.mixture.expert_names]
        return torch.tensor([*held, False]).float() * preserve.beta
