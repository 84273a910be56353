"""The training loop of a stage: one optimizer step after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.experts.init import named_generator
from dsmixer.losses.task import token_losses
from dsmixer.placement import groups
from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training.engine import StageEngine
from dsmixer.training.health import StopRequest, refuse_nonfinite
from dsmixer.training.optimizer import StepPlan
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


@dataclass(frozen=True)
class Loop:
    """Everything a step needs, and nothing it changes but the model and the optimizer.

    ``flat_rows`` lays a micro-batch out as one row: flash attention keeps packed examples apart only there.
    """

    world: World
    stage: Stage
    engine: StageEngine
    batch_of: Callable[[int], StepBatch]
    describe: Callable[[MicroBatch], str]
    stop_request: StopRequest
    seed: int
    flat_rows: bool = False

    def run_step(self, step: int) -> StepReport:
        """Optimizer step ``step`` (from 0): forward and backward over the micro-batches, then the update."""
        began = time.perf_counter()
        batch = self.batch_of(step)
        self._seed_dropout(step)
        statistics = self.stage.start_step(step, batch)
        local_sums, seen = self._accumulate(batch, statistics)
        task_sum, rsl, stop = self._reduce(local_sums, statistics)
        preserve, norms_U, plan = self._update(step, statistics)
        num_targets = max(1, int(batch.target_tokens.sum()))
        task_loss = task_sum / num_targets
        grad_norm = float(norms_U.sum().sqrt())
        refuse_nonfinite(self.world, self.engine.mixture, task_loss, norms_U, seen)
        self.engine.engine.step()
        return StepReport(
            step=step + 1,
            loss=task_loss + rsl + preserve,
            task_loss=task_loss,
            rsl=rsl,
            preserve=preserve,
            learning_rate=plan.learning_rate,
            router_learning_rate=plan.router_learning_rate,
            grad_norm=grad_norm,
            tokens=batch.real_tokens,
            target_tokens=num_targets,
            seconds=time.perf_counter() - began,
            statistics=statistics,
            stop=stop > 0,
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
        with context.recording(stage.batch_routing(micro), statistics, router_loss):
            logits = engine(
                input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False
            ).logits
        losses_BS = token_losses(logits, micro.labels)
        objective = (losses_BS * stage.token_weights(micro)).sum()
        routing = context.take_loss()
        if routing is not None:
            routing = routing * router_scale
            objective = objective + routing
        # DeepSpeed averages gradients over all ranks; the weights above already divide by the whole step
        engine.backward(objective * self.world.size, scale_wrt_gas=False)
        zero = torch.zeros((), device=self.world.device)
        return losses_BS.detach().sum(), zero if routing is None else routing.detach().to(zero.dtype)

    def _reduce(self, sums: torch.Tensor, statistics: RoutingStatistics | None) -> tuple[float, float, float]:
        """One all-reduce for the losses and for the statistics of all routers."""
        counted = sums.new_zeros(0) if statistics is None else statistics.buffer.flatten()
        reduced = groups.sum_over_ranks(torch.cat((sums, counted)))
        if statistics is not None:
            statistics.buffer.copy_(reduced[sums.numel() :].view_as(statistics.buffer))
        task_sum, routing_sum, stop = reduced[: sums.numel()].tolist()
        return task_sum, routing_sum, stop

    def _update(
        self, step: int, statistics: RoutingStatistics | None
    ) -> tuple[float, torch.Tensor, StepPlan]:
        """Prepare the optimizer: preserve, per-expert norms, clipping. ``engine.step`` then applies it."""
        optimizer, engine = self.engine.optimizer, self.engine.engine
        plan = self.stage.plan(step, statistics)
        grads = groups.gradients(engine, self.engine.shards)
        preserve = optimizer.add_preserve(grads, plan)
        sums = torch.cat((optimizer.squared_norms(grads), preserve[None]))
        groups.sum_over_partitions(engine, sums)
        optimizer.prepare(plan, sums[:-1])
        return float(sums[-1]), sums[:-1].cpu(), plan
