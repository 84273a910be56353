"""Run one stage from its newest checkpoint to its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import nn

from dsmixer.checkpoint.publish import list_checkpoints
from dsmixer.checkpoint.restore import SavedCheckpoint
from dsmixer.checkpoint.retention import Retention
from dsmixer.checkpoint.schema import step_name, step_of
from dsmixer.config.ds_json import deepspeed_config
from dsmixer.config.recipe import dump_recipe
from dsmixer.config.stages import Stage2Config, StageConfig
from dsmixer.model.inject import Mixture
from dsmixer.training.ahead import Ahead
from dsmixer.training.data import StageData
from dsmixer.training.engine import StageEngine, start_engine
from dsmixer.training.health import Stopped
from dsmixer.training.heap import keep_freed_memory
from dsmixer.training.loop import Loop, StepReport
from dsmixer.training.moments import Keep
from dsmixer.training.optimizer import AdamSettings
from dsmixer.training.profile.clock import SAVING
from dsmixer.training.profile.steps import StageProfile
from dsmixer.training.progress import Progress
from dsmixer.training.run_state import RunState
from dsmixer.training.saving import (
    Save,
    SaveError,
    check_fits,
    load_weights,
    restore_optimizer,
    save_checkpoint,
)
from dsmixer.training.stage_logs import StageLogs, open_logs
from dsmixer.training.stages import HardStage, SoftStage, Stage, expert_lookup, routing_in_training
from dsmixer.training.symptoms import Symptoms
from dsmixer.training.together import stop_together
from dsmixer.training.world import once


def adam_settings(config: StageConfig, experts: Sequence[str] = ()) -> AdamSettings:
    """The optimizer's settings of a stage, over the experts of these names."""
    rows = None
    if isinstance(config, Stage2Config) and config.routers != "all":
        rows = tuple(experts.index(name) for name in config.routers)
    return AdamSettings(
        config.betas,
        config.eps,
        config.weight_decay,
        config.clip,
        Keep(
            "8bit" if config.optimizer.endswith("8bit") else "float32", config.optimizer.startswith("paged")
        ),
        isinstance(config, Stage2Config) and config.preserve.origin == "host",
        rows,
    )


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
    of_domain = state.data.expert_of_domain(mixture.expert_names)
    if number == 1:
        place_of = {expert: place for place, expert in enumerate(mixture.placement.layout.local)}
        places = [place_of.get(expert, -1) for expert in of_domain]
        return HardStage(
            recipe.stage1,
            data.sampler.num_steps,
            num_experts,
            expert_lookup(of_domain, device),
            expert_lookup(places, device),
            len(place_of),
        )
    return SoftStage(
        config=recipe.stage2,
        num_steps=data.sampler.num_steps,
        mixture=mixture,
        routing=routing_in_training(recipe.stage2, mixture.config),
        device=device,
        num_domains=len(state.data.domains),
        expert_of_domain=expert_lookup(of_domain, device),
        usage=usage,
    )


def run_stage(state: RunState, number: int, data: StageData) -> StageEngine:
    """Train a stage to its end, from its newest checkpoint if it has one; the engine stays on the model.

    Raises:
        Stopped: after a signal, saved.
        NonFiniteError: a loss or gradient was not finite; nothing was updated with it.
        SaveError: the end of the stage, or the step at which a signal stopped it, could not be saved.
        UserError: the checkpoint does not fit the recipe.
    """
    loaded, mixture = state.loaded, state.mixture
    config = loaded.stage(f"stage{number}")
    saved = state.checkpoints.open(number)
    if saved is not None:
        check_fits(saved, mixture, trainable(mixture, config))
        load_weights(mixture, saved)
    ds_config = deepspeed_config(loaded, config, state.world.size, state.ds_path)
    settings = adam_settings(config, mixture.expert_names)
    engine = start_engine(mixture, trainable(mixture, config), settings, ds_config)
    start, usage = 0, None
    if saved is not None:
        start, usage = _go_on(state, engine, saved, data), saved.small("usage")
    elif isinstance(config, Stage2Config) and config.experts == "preserve":
        engine.optimizer.hold_origin()
    once(state.world, lambda: _set_damaged_aside(state, number, start))
    stage = make_stage(state, number, data, usage)
    if state.world.device.type == "cpu":
        keep_freed_memory()
    with Ahead(data.batch, stage.num_steps, state.world.device) as batch_of:
        loop = Loop(
            world=state.world,
            stage=stage,
            engine=engine,
            batch_of=batch_of,
            describe=data.describe,
            stop_request=state.stop_request,
            seed=loaded.recipe.run.seed,
            flat_rows=_attention_of(mixture.model).startswith("flash"),
            nonfinite=state.nonfinite,
            pulse=state.pulse,
        )
        if start < stage.num_steps:
            _StageLog(state, stage, data, saved_step=start or None).run(loop, start)
    return engine


def _go_on(state: RunState, engine: StageEngine, saved: SavedCheckpoint, data: StageData) -> int:
    """Moments and counts of a checkpoint; the step to go on with."""
    restore_optimizer(engine, saved)
    then, size = saved.state.layout, state.world.size
    start = saved.state.step
    assert state.taken.allow_changes or not data.sampler.differences(saved.state.cursor)
    there = f"{then['ranks']}, ZeRO {then['zero_stage']}, EP {then['expert_parallel_size']}"
    here = f"{size}, EP {state.mixture.placement.layout.size}"
    state.say(
        f"stage {saved.state.stage} goes on after step {start} of {data.sampler.num_steps} "
        f"({saved.path.name}; ranks then: {there}; ranks now: {here})"
    )
    return start


def _set_damaged_aside(state: RunState, number: int, start: int) -> None:
    """What a stage has past the step that it goes on from was passed over as damaged."""
    paths = list_checkpoints(state.folder.checkpoints(number))
    state.checkpoints.set_aside([path for path in paths if step_of(path.name) > start])


def _attention_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None))


@dataclass
class _StageLog:
    """The loop with what surrounds each step: metrics, progress, checkpoints, and stopping."""

    state: RunState
    stage: Stage
    data: StageData
    losses: list[float] = field(default_factory=list)
    saved_step: int | None = None

    def run(self, loop: Loop, start: int) -> None:
        mixture = self.state.mixture
        mixture.model.train()
        health, routers = self.state.loaded.recipe.health, list(mixture.routers)
        symptoms = Symptoms(health, mixture.expert_names, routers)
        saves = (self, "_save", SAVING)
        profile = StageProfile(self.state.profile, loop, start, self.state.folder.path, saves)
        with (
            self.state.pulse.inside(self.stage.number),
            mixture.context.routed(self.stage.routing),
            self._progress(start) as progress,
        ):
            with open_logs(self.state, self.stage, start) as logs, profile:
                for step in range(start, self.stage.num_steps):
                    with profile.step(step):
                        report = loop.run_step(step)
                        logs.write(report)
                        for text in symptoms.look(report) if self.state.world.rank == 0 else ():
                            self.state.warn(text)
                        rate = report.tokens / report.seconds
                        progress.update(report.step, loss=report.loss, tokens_per_second=rate)
                        self._save_where_due(loop, report, logs)
        mixture.context.clear()
        mixture.model.eval()
        profile.show()

    def _progress(self, start: int) -> Progress:
        return Progress(
            f"stage {self.stage.number}",
            self.stage.num_steps,
            done=start,
            world_rank=self.state.world.rank,
        )

    def _save_where_due(self, loop: Loop, report: StepReport, logs: StageLogs) -> None:
        if math.isfinite(report.loss):
            self.losses.append(report.loss)
        last = report.step == self.stage.num_steps
        if last or report.stop or report.step % self.state.loaded.recipe.checkpoint.every == 0:
            logs.flush()
            self._save(loop, report.step, needed=last or report.stop)
        if report.stop:
            raise Stopped(f"stopped after step {report.step} of stage {self.stage.number}, and saved")

    def _save(self, loop: Loop, step: int, *, needed: bool) -> None:
        """Save; without space a step between goes on unsaved, and one after which the run ends or goes into
        its next stage is refused: nothing that follows could be taken up again."""
        path = self.state.folder.checkpoints(self.stage.number)
        checkpoint = self.state.loaded.recipe.checkpoint
        save = Save(
            folder=path,
            stage=self.stage.number,
            step=step,
            num_steps=self.stage.num_steps,
            rows=self.state.rows,
            loss=sum(self.losses) / len(self.losses) if self.losses else None,
            cursor=self.data.sampler.state(step),
            config=dump_recipe(self.state.taken.asked.recipe),
            usage=self.stage.usage if isinstance(self.stage, SoftStage) else None,
            retention=Retention(checkpoint.keep, checkpoint.keep_every, checkpoint.keep_best),
            base=self.state.taken.base,
            lock=self.state.lock,
        )
        try:
            with self.state.pulse.saving(str(path)):
                save_checkpoint(self.state.world, loop.engine, save)
        except SaveError as error:
            problem = f"step {step} of stage {self.stage.number} could not be saved: {error}"
            if needed:
                self._refuse(f"{problem}. {self._what_remains()}")
            self.state.warn(f"{problem}; the run goes on. {self._what_remains()}")
        else:
            self.losses.clear()
            self.saved_step = step

    def _refuse(self, problem: str) -> NoReturn:
        stop_together(self.state.world, SaveError(problem))

    def _what_remains(self) -> str:
        if self.saved_step is None:
            return "Nothing is lost that was saved before; make room and run the same command again"
        return f"{step_name(self.saved_step)} is whole; make room and run the same command again"
