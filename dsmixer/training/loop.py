"""The training loop of a stage: one optimizer step after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.experts.init import named_generator
from dsmixer.losses.task import target_losses
from dsmixer.placement import groups
from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training.engine import StageEngine
from dsmixer.training.health import StopRequest
from dsmixer.training.nonfinite import NonFinitePolicy, StepNumbers, vote
from dsmixer.training.optimizer import StepPlan
from dsmixer.training.pulse import Pulse
from dsmixer.training.stages import Stage
from dsmixer.training.world import World


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step was.

    Attributes:
        step: from 1.
        loss: task_loss + rsl + preserve, nats.
        task_loss: mean cross-entropy over all target tokens of the step, nats a token.
        rsl: the routing loss, mean over routers.
        preserve: value of the preserve term before the step.
        learning_rate: of the experts (of the routers where no expert trains).
        router_learning_rate: of the routers.
        grad_norm: norm of the whole gradient before clipping.
        tokens: real tokens of the step, over all ranks.
        target_tokens: of them with loss.
        seconds: wall time of the step.
        statistics: of the routers, reduced over ranks; None in stage one.
        stop: whether some rank was asked to stop.
        skipped: whether a number was not finite and nothing was updated.
        chosen_E: how often the routers chose each expert, on the host; None in stage one.
    """

    step: int
    loss: float
    task_loss: float
    rsl: float
    preserve: float
    learning_rate: float
    router_learning_rate: float
    grad_norm: float
    tokens: int
    target_tokens: int
    seconds: float
    statistics: RoutingStatistics | None
    stop: bool
    skipped: bool = False
    chosen_E: torch.Tensor | None = None


@dataclass(frozen=True)
class Loop:
    """Everything a step needs, and nothing it changes but the model and the optimizer.

    ``flat_rows`` lays a micro-batch out as one row: flash attention keeps packed examples apart only there.
    ``nonfinite`` counts the steps that were skipped; ``pulse`` is told where the loop stands.
    """

    world: World
    stage: Stage
    engine: StageEngine
    batch_of: Callable[[int], StepBatch]
    describe: Callable[[MicroBatch], str]
    stop_request: StopRequest
    seed: int
    flat_rows: bool = False
    nonfinite: NonFinitePolicy = field(default_factory=NonFinitePolicy)
    pulse: Pulse = field(default_factory=Pulse)

    def run_step(self, step: int) -> StepReport:
        """Optimizer step ``step`` (from 0): forward and backward over the micro-batches, then the update."""
        began = time.perf_counter()
        self.pulse.begin_step(step + 1)
        batch = self.batch_of(step)
        self._seed_dropout(step)
        statistics = self.stage.start_step(step, batch)
        local_sums, seen = self._accumulate(batch, statistics)
        losses = self._reduce(local_sums, statistics)
        sums, plan, grads = self._update(step, statistics)
        num_targets = max(1, int(batch.target_tokens.sum()))
        numbers = StepNumbers.fetch(losses, num_targets, sums, statistics)
        place = f"step {step + 1} of stage {self.stage.number}"
        mixture = self.engine.mixture
        problems = numbers.problems(mixture.expert_names, list(mixture.routers))
        skipped = vote(self.world, problems, seen, self.nonfinite, place)
        norms_U = numbers.squared_norms_U
        if skipped:
            plan = self._drop(plan, grads)
        self.engine.optimizer.prepare(plan, torch.zeros_like(norms_U) if skipped else norms_U)
        self.engine.engine.step()
        seconds = time.perf_counter() - began
        self.pulse.end_step(seconds)
        return StepReport(
            step=step + 1,
            loss=numbers.task_loss + numbers.rsl + numbers.preserve,
            task_loss=numbers.task_loss,
            rsl=numbers.rsl,
            preserve=numbers.preserve,
            learning_rate=plan.learning_rate,
            router_learning_rate=plan.router_learning_rate,
            grad_norm=float(norms_U.sum().sqrt()),
            tokens=batch.real_tokens,
            target_tokens=num_targets,
            seconds=seconds,
            statistics=statistics,
            stop=numbers.stop,
            skipped=skipped,
            chosen_E=numbers.chosen_E,
        )

    def _seed_dropout(self, step: int) -> None:
        """Dropout of a step depends on the seed, the step and the rank alone, so a resumed run repeats it."""
        names = (f"stage {self.stage.number}", f"step {step}", f"rank {self.world.rank}")
        torch.manual_seed(named_generator(self.seed, *names).initial_seed())

    def _accumulate(
        self, batch: StepBatch, statistics: RoutingStatistics | None
    ) -> tuple[torch.Tensor, list[tuple[str, torch.Tensor]]]:
        """All micro-batches forward and backward.

        Returns:
            sums over this rank of cross-entropy, routing loss and requests to stop, ``[3]``, and the
            description and cross-entropy of each micro-batch.
        """
        task_sum = torch.zeros((), device=self.world.device)
        routing_sum = torch.zeros((), device=self.world.device)
        seen = []
        engine = self.engine.engine
        for i, micro in enumerate(batch.micro_batches):
            self.pulse.enter(f"micro-batch {i + 1} of {len(batch.micro_batches)}")
            task, routing = self._forward_backward(micro.to(self.world.device), statistics)
            task_sum += task
            routing_sum += routing
            seen.append((self.describe(micro), task))
            if i + 1 < len(batch.micro_batches):
                engine.step()
        stop = self.stop_request.as_number(self.world.device)
        return torch.stack((task_sum, routing_sum, stop)), seen

    def _forward_backward(
        self, micro: MicroBatch, statistics: RoutingStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stage, context, engine = self.stage, self.engine.mixture.context, self.engine.engine
        if self.flat_rows:
            micro = micro.flat()
        router_loss, router_scale = stage.router_loss()
        batch = stage.batch_routing(micro)
        with context.recording(batch, statistics, router_loss, stage.output_loss()):
            # no name for the logits: the backward pass may free them before it comes to the layers
            losses_BS = target_losses(engine(**micro.inputs(), use_cache=False).logits, micro.targets)
        objective = (losses_BS * stage.token_weights(micro)).sum()
        routing = context.take_loss()
        if routing is not None:
            routing = routing * router_scale
            objective = objective + routing
        # DeepSpeed averages gradients over all ranks; the weights above already divide by the whole step
        engine.backward(objective * self.world.size, scale_wrt_gas=False)
        zero = torch.zeros((), device=self.world.device)
        return losses_BS.detach().sum(), zero if routing is None else routing.detach().to(zero.dtype)

    def _reduce(self, sums: torch.Tensor, statistics: RoutingStatistics | None) -> torch.Tensor:
        """One all-reduce for the losses, which it returns, and for the statistics of all routers."""
        self.pulse.enter("adding up the losses")
        counted = sums.new_zeros(0) if statistics is None else statistics.buffer.flatten()
        reduced = groups.sum_over_ranks(torch.cat((sums, counted)))
        if statistics is not None:
            statistics.buffer.copy_(reduced[sums.numel() :].view_as(statistics.buffer))
        return reduced[: sums.numel()]

    def _update(
        self, step: int, statistics: RoutingStatistics | None
    ) -> tuple[torch.Tensor, StepPlan, list[list[torch.Tensor]]]:
        """Complete the gradients of a step.

        Returns:
            squared norms of the units and, last, the preserve term, ``[U + 1]``, over all ranks; the plan of
            the step; this rank's gradients.
        """
        self.pulse.enter("adding up the gradients")
        optimizer, engine = self.engine.optimizer, self.engine.engine
        plan = self.stage.plan(step, statistics)
        grads = self.engine.gradients()
        sums = optimizer.measure(grads, plan)
        groups.sum_over_partitions(engine, sums)
        self.pulse.enter("updating")
        return sums, plan, grads

    def _drop(self, plan: StepPlan, grads: list[list[torch.Tensor]]) -> StepPlan:
        """Make the step one that reaches nothing: DeepSpeed ends its accumulation, and our optimizer, which
        it calls, leaves weights, moments and counts as they are."""
        for grad in (grad for of_shard in grads for grad in of_shard):
            grad.zero_()
        self.stage.forget_step()
        return replace(plan, reached=torch.zeros_like(plan.reached))
