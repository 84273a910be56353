"""What each step of a stage leaves behind: a row of metrics.jsonl, and of the logs that draw its curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsmixer.losses.rsl import ENTROPY_SIGNS, RoutingSpecializationLoss, ramp_at
from dsmixer.losses.terms import RoutingTerms
from dsmixer.report.routing_terms import BALANCE_KEY, ENTROPY_KEY
from dsmixer.training.loop import StepReport
from dsmixer.training.metrics import DeviceMemory, MetricsLog, routing_metrics
from dsmixer.training.run_state import RunState
from dsmixer.training.stages import SoftStage, Stage
from dsmixer.training.tensorboard import TensorBoardLog
from dsmixer.training.wandb_log import WandbLog


@dataclass
class StageLogs:
    """metrics.jsonl, TensorBoard and Weights & Biases of one stage; on ranks above 0 nothing."""

    state: RunState
    stage: Stage
    metrics: MetricsLog | None
    tensorboard: TensorBoardLog | None
    memory: DeviceMemory
    wandb: WandbLog | None = None

    def write(self, report: StepReport) -> None:
        """One step, if it is to be logged, or was skipped: those are counted over the starts of a run."""
        every = self.state.loaded.recipe.run.log_every
        last = report.step == self.stage.num_steps
        due = last or report.skipped or report.step % every == 0
        if self.metrics is None or not due or self._is_anothers():
            return
        row = self.metrics.write(self.stage.number, report.step, self._values(report))
        if self.tensorboard is not None:
            self.tensorboard.write(self.stage.number, report.step, row, report.statistics, last=last)
        if self.wandb is not None:
            self.wandb.write(report.step, row)

    def _is_anothers(self) -> bool:
        """Whether the folder is another job's by now; this one stops at its next save."""
        return self.state.lock is not None and self.state.lock.lost

    def flush(self) -> None:
        """Put the rows so far on the disk, before the checkpoint that they lead to."""
        if self.metrics is not None and not self._is_anothers():
            self.metrics.flush()

    def _values(self, report: StepReport) -> dict[str, Any]:
        values: dict[str, Any] = {
            "loss": report.loss,
            "task_loss": report.task_loss,
            "rsl": report.rsl,
            "preserve": report.preserve,
            "learning_rate": report.learning_rate,
            "router_learning_rate": report.router_learning_rate,
            "grad_norm": report.grad_norm,
            "skipped": int(report.skipped),
            "tokens": report.tokens,
            "target_tokens": report.target_tokens,
            "seconds": report.seconds,
            "tokens_per_second": report.tokens / report.seconds,
            **self.memory.metrics(),
        }
        if report.statistics is not None:
            names = self.state.mixture.expert_names
            experts = self.state.data.expert_of_domain(names)
            routers = routing_metrics(report.statistics, expert_names=names, expert_of_domain=experts)
            return values | routers | self._rsl_terms(report, routers.get("routing_entropy"))
        # no router takes part in stage one; the keys are there for whoever reads every row
        return values | {"routing_entropy": None, "load_variance": None}

    def _rsl_terms(self, report: StepReport, entropy: float | None) -> dict[str, float]:
        if entropy is None or not isinstance(self.stage, SoftStage):
            return {}
        ramp = ramp_at(report.step - 1, self.stage.num_steps, self.stage.config.rsl.ramp)
        return rsl_terms(self.stage.terms, ramp, report.rsl, entropy)

    def __enter__(self) -> StageLogs:
        return self

    def __exit__(self, *error: object) -> None:
        for log in (self.metrics, self.tensorboard, self.wandb):
            if log is not None:
                log.close()


def rsl_terms(losses: RoutingTerms, ramp: float, total: float, entropy: float) -> dict[str, float]:
    """``rsl_balance`` and ``rsl_entropy``, the terms of RSL (arXiv 2507.00029, eq. 5), whose sum is ``rsl``.

    Args:
        losses: what the routers train with; nothing is found where that is not RSL alone.
        ramp: 0 to 1, how far alpha and lambda had risen in the step.
        total: the loss, mean over routers.
        entropy: of a token, nats, mean over tokens and routers.
    """
    rsl = losses.terms[0] if len(losses.terms) == 1 else None
    if not isinstance(rsl, RoutingSpecializationLoss):
        return {}
    term = ramp * ENTROPY_SIGNS[rsl.entropy] * rsl.entropy_weight * entropy
    return {BALANCE_KEY: total - term, ENTROPY_KEY: term}


def open_logs(state: RunState, stage: Stage, start: int) -> StageLogs:
    """Those of a stage that goes on after step ``start``; rows past it are cut."""
    memory = DeviceMemory(state.world.device)
    if state.world.rank != 0:
        return StageLogs(state, stage, None, None, memory)
    restored = (stage.number, start) if start or stage.number == 2 else None
    metrics = MetricsLog(state.folder.path, restored=restored)
    run, tensorboard = state.loaded.recipe.run, None
    if run.tensorboard:
        tensorboard = TensorBoardLog(
            state.folder.tensorboard,
            world_rank=0,
            expert_names=state.mixture.expert_names,
            domain_names=state.data.domain_names,
            router_names=list(state.mixture.routers),
        )
    wandb = None
    if run.wandb is not None:
        wandb = WandbLog(state.folder.path, project=run.wandb, name=run.name, stage=stage.number)
    return StageLogs(state, stage, metrics, tensorboard, memory, wandb)
