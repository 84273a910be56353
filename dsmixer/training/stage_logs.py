"""What each step of a stage leaves behind: a row of metrics.jsonl and TensorBoard's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsmixer.training.loop import StepReport
from dsmixer.training.metrics import DeviceMemory, MetricsLog, routing_metrics
from dsmixer.training.run_state import RunState
from dsmixer.training.stages import Stage
from dsmixer.training.tensorboard import TensorBoardLog


@dataclass
class StageLogs:
    """metrics.jsonl and TensorBoard of one stage; on ranks above 0 nothing."""

    state: RunState
    stage: Stage
    metrics: MetricsLog | None
    tensorboard: TensorBoardLog | None
    memory: DeviceMemory

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
            return values | routing_metrics(report.statistics, expert_names=names, expert_of_domain=experts)
        # no router takes part in stage one; the keys are there for whoever reads every row
        return values | {"routing_entropy": None, "load_variance": None}

    def __enter__(self) -> StageLogs:
        return self

    def __exit__(self, *error: object) -> None:
        for log in (self.metrics, self.tensorboard):
            if log is not None:
                log.close()


def open_logs(state: RunState, stage: Stage, start: int) -> StageLogs:
    """Those of a stage that goes on after step ``start``; rows past it are cut."""
    memory = DeviceMemory(state.world.device)
    if state.world.rank != 0:
        return StageLogs(state, stage, None, None, memory)
    restored = (stage.number, start) if start or stage.number == 2 else None
    metrics = MetricsLog(state.folder.path, restored=restored)
    tensorboard = None
    if state.loaded.recipe.run.tensorboard:
        tensorboard = TensorBoardLog(
            state.folder.tensorboard,
            world_rank=0,
            expert_names=state.mixture.expert_names,
            domain_names=state.data.domain_names,
            router_names=list(state.mixture.routers),
        )
    return StageLogs(state, stage, metrics, tensorboard, memory)
