"""Run one stage from its newest checkpoint to its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsmixer.checkpoint.publish import save_checkpoint
from dsmixer.checkpoint.restore import newest_checkpoint, read_checkpoint
from dsmixer.checkpoint.schema import Checkpoint
from dsmixer.config.ds_json import deepspeed_config
from dsmixer.config.recipe import LoadedRecipe
from dsmixer.config.stages import Stage2Config, StageConfig
from dsmixer.model.inject import Mixture
from dsmixer.training.data import RunData, StageData
from dsmixer.training.engine import StageEngine, start_engine
from dsmixer.training.health import Stopped, StopRequest
from dsmixer.training.loop import Loop, StepReport
from dsmixer.training.metrics import MetricsLog, routing_metrics
from dsmixer.training.optimizer import AdamSettings
from dsmixer.training.progress import Progress
from dsmixer.training.run_folder import RunFolder
from dsmixer.training.saving import load_weights, restore_optimizer, snapshot
from dsmixer.training.stages import HardStage, SoftStage, Stage, expert_lookup
from dsmixer.training.tensorboard import TensorBoardLog
from dsmixer.training.world import World, once


@dataclass
class RunState:
    """What the stages of a run share."""

    loaded: LoadedRecipe
    folder: RunFolder
    world: World
    mixture: Mixture
    data: RunData
    stop_request: StopRequest
    ds_path: str | None = None

    def say(self, text: str) -> None:
        """A line on rank 0."""
        if self.world.rank == 0:
            print(text, flush=True)

    def find_checkpoint(self, stage: int) -> Checkpoint | None:
        """The newest whole checkpoint of a stage, the same on every rank."""
        path = once(self.world, lambda: newest_checkpoint(self.folder.checkpoints(stage), self.say))
        return None if path is None else read_checkpoint(path)


def adam_settings(config: StageConfig) -> AdamSettings:
    """The optimizer's settings of a stage."""
    return AdamSettings(config.betas, config.eps, config.weight_decay, config.clip)


def trainable(mixture: Mixture, config: StageConfig) -> list[tuple[str, nn.Parameter]]:
    """What trains: the experts in stage one; the routers, and experts unless frozen, in stage two."""
    if not isinstance(config, Stage2Config):
        return list(mixture.expert_parameters())
    experts = [] if config.experts == "frozen" else list(mixture.expert_parameters())
    return [*experts, *mixture.router_parameters()]


def make_stage(state: RunState, number: int, data: StageData, usage: torch.Tensor | None) -> Stage:
    """The stage as the loop sees it."""
    recipe, mixture, device = state.loaded.recipe, state.mixture, state.world.device
    num_experts = len(mixture.expert_names)
    if number == 1:
        experts = expert_lookup(state.data.expert_of_domain(mixture.expert_names), device)
        return HardStage(recipe.stage1, data.sampler.num_steps, num_experts, experts)
    if usage is None:
        usage = torch.full((len(mixture.routers), num_experts), 1.0 / num_experts)
    return SoftStage(
        config=recipe.stage2,
        num_steps=data.sampler.num_steps,
        mixture=mixture,
        routing=mixture.config.default_routing(),
        device=device,
        num_domains=len(state.data.domains),
        usage=usage.to(device),
    )


def run_stage(state: RunState, number: int, data: StageData) -> StageEngine:
    """Train a stage to its end, from its newest checkpoint if it has one; the engine stays on the model.

    Raises:
        Stopped: after a signal, saved.
        NonFiniteError: a loss or gradient was not finite; nothing was updated with it.
    """
    loaded, mixture = state.loaded, state.mixture
    config = loaded.stage(f"stage{number}")
    checkpoint = state.find_checkpoint(number)
    if checkpoint is not None:
        load_weights(mixture, checkpoint.group("weights"))
    ds_config = deepspeed_config(loaded, config, state.world.size, state.ds_path)
    engine = start_engine(mixture, trainable(mixture, config), adam_settings(config), ds_config)
    start, usage = 0, None
    if checkpoint is not None:
        restore_optimizer(engine, checkpoint)
        start, usage = data.sampler.check(checkpoint.state.cursor), checkpoint.tensors.get("usage")
    elif isinstance(config, Stage2Config) and config.experts == "preserve":
        engine.optimizer.hold_origin()
    stage = make_stage(state, number, data, usage)
    loop = Loop(
        world=state.world,
        stage=stage,
        engine=engine,
        batch_of=data.batch,
        describe=data.describe,
        stop_request=state.stop_request,
        seed=loaded.recipe.run.seed,
        flat_rows=_attention_of(mixture.model).startswith("flash"),
    )
    if start < stage.num_steps:
        _StageLog(state, stage, data).run(loop, start)
    return engine


def _attention_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None))


@dataclass
class _StageLog:
    """The loop with what surrounds each step: metrics, progress, checkpoints, and stopping."""

    state: RunState
    stage: Stage
    data: StageData

    def run(self, loop: Loop, start: int) -> None:
        mixture = self.state.mixture
        mixture.model.train()
        with mixture.context.routed(self.stage.routing), self._progress(start) as progress:
            with _logs(self.state, self.stage, start) as logs:
                for step in range(start, self.stage.num_steps):
                    report = loop.run_step(step)
                    logs.write(report)
                    rate = report.tokens / report.seconds
                    progress.update(report.step, loss=report.loss, tokens_per_second=rate)
                    self._save_where_due(loop, report)
        mixture.context.clear()
        mixture.model.eval()

    def _progress(self, start: int) -> Progress:
        return Progress(
            f"stage {self.stage.number}",
            self.stage.num_steps,
            done=start,
            world_rank=self.state.world.rank,
        )

    def _save_where_due(self, loop: Loop, report: StepReport) -> None:
        last = report.step == self.stage.num_steps
        if last or report.stop or report.step % self.state.loaded.recipe.checkpoint.every == 0:
            self._save(loop, report.step)
        if report.stop:
            raise Stopped(f"stopped after step {report.step} of stage {self.stage.number}, and saved")

    def _save(self, loop: Loop, step: int) -> None:
        checkpoint = snapshot(
            loop.engine,
            stage=self.stage.number,
            step=step,
            num_steps=self.stage.num_steps,
            cursor=self.data.sampler.state(step),
            usage=self.stage.usage if isinstance(self.stage, SoftStage) else None,
        )
        folder = self.state.folder.checkpoints(self.stage.number)
        keep = self.state.loaded.recipe.checkpoint.keep
        once(self.state.world, lambda: save_checkpoint(folder, checkpoint, keep).name)


@dataclass
class _Logs:
    """metrics.jsonl and TensorBoard of one stage; on ranks above 0 nothing."""

    state: RunState
    stage: Stage
    metrics: MetricsLog | None
    tensorboard: TensorBoardLog | None

    def write(self, report: StepReport) -> None:
        """One step, if it is to be logged."""
        every = self.state.loaded.recipe.run.log_every
        last = report.step == self.stage.num_steps
        if self.metrics is None or (report.step % every and not last):
            return
        row = self.metrics.write(self.stage.number, report.step, self._values(report))
        if self.tensorboard is not None:
            self.tensorboard.write(self.stage.number, report.step, row, report.statistics, last=last)

    def _values(self, report: StepReport) -> dict[str, Any]:
        values: dict[str, Any] = {
            "loss": report.loss,
            "task_loss": report.task_loss,
            "rsl": report.rsl,
            "preserve": report.preserve,
            "learning_rate": report.learning_rate,
            "router_learning_rate": report.router_learning_rate,
            "grad_norm": report.grad_norm,
            "tokens": report.tokens,
            "target_tokens": report.target_tokens,
            "seconds": report.seconds,
            "tokens_per_second": report.tokens / report.seconds,
        }
        if report.statistics is not None:
            names = self.state.mixture.expert_names
            experts = self.state.data.expert_of_domain(names)
            return values | routing_metrics(report.statistics, expert_names=names, expert_of_domain=experts)
        # no router takes part in stage one; the keys are there for whoever reads every row
        return values | {"routing_entropy": None, "load_variance": None}

    def __enter__(self) -> _Logs:
        return self

    def __exit__(self, *error: object) -> None:
        for log in (self.metrics, self.tensorboard):
            if log is not None:
                log.close()


def _logs(state: RunState, stage: Stage, start: int) -> _Logs:
    if state.world.rank != 0:
        return _Logs(state, stage, None, None)
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
    return _Logs(state, stage, metrics, tensorboard)
