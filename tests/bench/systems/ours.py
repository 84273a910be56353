"""This package: a whole step of a run's loop, and decoding as a published mixture does it.

The engine is DeepSpeed's under ZeRO-0 on one process; the loop, the stages, the optimizer and its clipping
are those of ``dsmixer train``: what the loop reduces, checks for numbers that are not finite and counts for
its metrics is in the step. Writing metrics and saving are not.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from dsmixer.config.stages import Stage2Config
from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.quantized import freeze_packed
from dsmixer.model.serving import ready_to_serve
from dsmixer.training.engine import StageEngine, start_engine
from dsmixer.training.health import StopRequest
from dsmixer.training.heap import keep_freed_memory
from dsmixer.training.loop import Loop
from dsmixer.training.stage_run import adam_settings, trainable
from dsmixer.training.world import join_world
from tests.bench.case import TARGETS, Case
from tests.bench.decoding import Decoding
from tests.bench.low_memory import make_stage, stage_config
from tests.bench.systems.interface import Built
from tests.bench.systems.llama import SCALING, expert_pair, place_of, random_llama, router_weight, step_ids

COLLECTIVE_TIMEOUT = 600.0
NUM_STEPS = 1000
"""Of the stages that ``make_stage`` makes; the ramp and the schedule go on through the bench."""


def stage_one(case: Case) -> Built:
    """Hard routing by the domain of each token; the experts train."""
    return _build(case, "stage one")


def stage_two(case: Case) -> Built:
    """Top-K routing with the routing loss; experts and routers train, experts held by the preserve term."""
    return _build(case, "preserve")


def frozen_experts(case: Case) -> Built:
    """The same with frozen experts: routers alone train."""
    return _build(case, "frozen")


def _build(case: Case, kind: str) -> Built:
    mixture = _mixture(case)
    if case.what == "decode":
        model = ready_to_serve(mixture.model)
        return Built(0, decode_token=Decoding(model, case.rows, case.sequence, case.device).next_token)
    if case.device == "cpu":
        keep_freed_memory()
    world, config = join_world(COLLECTIVE_TIMEOUT), stage_config(kind)
    trained = trainable(mixture, config)
    engine = start_engine(mixture, trained, adam_settings(config), _ds_config(case))
    if isinstance(config, Stage2Config) and config.experts == "preserve":
        engine.optimizer.hold_origin()
    mixture.model.train()
    loop = Loop(
        world=world,
        stage=make_stage(config, mixture, world.device),
        engine=engine,
        batch_of=functools.partial(_batch, case),
        describe=lambda micro: "",
        stop_request=StopRequest(),
        seed=0,
    )
    step = _Step(loop, mixture)
    return Built(sum(p.numel() for _, p in trained), step, close=functools.partial(_release, mixture, engine))


class _Step:
    """A step of the loop; past the last step of the stage it begins again."""

    def __init__(self, loop: Loop, mixture: Mixture) -> None:
        self.loop, self.mixture = loop, mixture

    def __call__(self, step: int) -> tuple[float, float]:
        with self.mixture.context.routed(self.loop.stage.routing):
            report = self.loop.run_step(step % NUM_STEPS)
        return report.task_loss, report.grad_norm


def _release(mixture: Mixture, engine: StageEngine) -> None:
    mixture.context.clear()
    engine.release()


def _mixture(case: Case) -> Mixture:
    """The pool on the base, with the weights that every system has."""
    model = random_llama(case)
    if case.dtype == "nf4":
        freeze_packed(model, torch.bfloat16)
    names = [f"expert{number}" for number in range(case.experts)]
    config = MixerConfig(
        TARGETS, names, rank=case.rank, alpha=SCALING * case.rank, top_k=min(case.top_k, case.experts)
    )
    mixture = attach_mixers(model, config)
    mixture.model.to(case.device)
    with torch.no_grad():
        for path, mixer in mixture.mixers.items():
            for number in range(case.experts):
                a_RD, b_OR = expert_pair(case, *place_of(path), number)
                mixer.bank.lora_A[number].copy_(a_RD)
                mixer.bank.lora_B[number].copy_(b_OR.T)
        for path, router in mixture.routers.items():
            router.weight.copy_(router_weight(case, *place_of(path)))
    return mixture


def _batch(case: Case, step: int) -> StepBatch:
    """One micro-batch; stretches of a row are of one domain each, the domains in turn."""
    ids = step_ids(case, step)
    stretches = min(case.domains_a_row, case.experts)
    of_row = torch.arange(case.sequence) * stretches // case.sequence
    first = (step * case.rows + torch.arange(case.rows)) * stretches
    domains = (first[:, None] + of_row[None]) % case.experts
    targets = torch.zeros(case.experts, dtype=torch.int64)
    targets.index_add_(0, domains[:, 1:].flatten(), torch.ones_like(domains[:, 1:].flatten()))
    places = torch.arange(case.sequence).expand(case.rows, -1).contiguous()
    num_targets = int(targets.sum())
    micro = MicroBatch(ids, ids, places, domains, domains, ids.numel(), num_targets)
    return StepBatch([micro], targets, ids.numel())


def _ds_config(case: Case) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": case.rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 0},
    }
