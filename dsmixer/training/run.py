"""A whole run: data, base, mixers, stage one, stage two, the published mixture, its evaluation and report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dsmixer.adapters.importing import Pool, fill_experts
from dsmixer.config.batch import check_world
from dsmixer.config.ds_json import resolved_zero_stage
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe
from dsmixer.config.schema import Recipe
from dsmixer.data.records import Example
from dsmixer.model.count import WeightCounts, count_weights
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.load import LoadedBase, load_base
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.training.data import RunData, StageData, stage_data
from dsmixer.training.engine import StageEngine
from dsmixer.training.finish import finish_run
from dsmixer.training.health import StopRequest
from dsmixer.training.placing import place_experts, plan_run
from dsmixer.training.preflight import check_stage_order, read_inputs
from dsmixer.training.run_folder import RunFolder, claim_run_folder, find_run_folder, write_json
from dsmixer.training.saving import load_weights
from dsmixer.training.stage_run import RunState, run_stage
from dsmixer.training.world import World, gather_objects, join_world, once


@dataclass(frozen=True)
class RunRequest:
    """What the command line asked for.

    Attributes:
        loaded: the checked recipe, DeepSpeed file merged in.
        stages: the stages to run now, of those that the recipe enables.
        ds_path: a DeepSpeed JSON file from the command line.
    """

    loaded: LoadedRecipe
    stages: tuple[int, ...] = (1, 2)
    ds_path: str | None = None


def train(request: RunRequest) -> None:
    """Do what is left of a run; does nothing where all is done.

    Raises:
        UserError: a mistake in what the user gave.
        Stopped: a signal came; the run has saved and can be taken up again.
        NonFiniteError: a loss or gradient was not finite.
    """
    recipe, stages = request.loaded.recipe, _stages_of(request)
    world = join_world(max(recipe.health.hang_timeout, 60.0))
    accumulation = check_world(request.loaded, world.size)
    folder = once(world, lambda: find_run_folder(request.loaded))
    once(world, lambda: check_stage_order(recipe, stages, folder.checkpoints(1)))
    if folder.finished():
        _say(world, f"{folder.path} is finished; its report is {folder.report}")
        return
    stop_request = StopRequest()
    with stop_request.listening():
        state, base = _set_up(request, world, folder, stop_request)
        engine = None
        for number in _stages_left(state, stages):
            if engine is not None:
                engine.release()
            engine = _one_stage(state, base, number, accumulation[f"stage{number}"])
        stop_request.at_once = True  # everything is saved, and no loop looks at the request any more
        if _left_for_later(request):
            _say(world, f"stage {_left_for_later(request)} is left for another call of the same command")
            return
        assert engine is not None
        finish_run(state, base, engine)


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)


def _enabled(recipe: Recipe) -> list[int]:
    return [n for n, stage in ((1, recipe.stage1), (2, recipe.stage2)) if stage.enabled]


def _stages_of(request: RunRequest) -> list[int]:
    chosen = [number for number in _enabled(request.loaded.recipe) if number in request.stages]
    if not chosen:
        raise UserError(
            f"the recipe enables no stage of {', '.join(map(str, request.stages))}",
            where="--stages",
            fix="enable the stage in the recipe, or choose another",
        )
    return chosen


def _stages_left(state: RunState, stages: list[int]) -> list[int]:
    """Of the stages to run, those that are: stage one needs no engine again where stage two only wants its
    experts."""
    if stages != [1, 2]:
        return stages
    checkpoint = state.find_checkpoint(1)
    return [2] if checkpoint is not None and checkpoint.state.finished else stages


def _left_for_later(request: RunRequest) -> int | None:
    """An enabled stage after those of this call."""
    later = [n for n in _enabled(request.loaded.recipe) if n > max(_stages_of(request))]
    return later[0] if later else None


def _set_up(
    request: RunRequest, world: World, folder: RunFolder, stop_request: StopRequest
) -> tuple[RunState, LoadedBase]:
    """Data, base model with mixers, and the plan."""
    recipe = request.loaded.recipe
    began = time.perf_counter()
    data, pool = read_inputs(request.loaded, folder.quarantine if world.rank == 0 else None)
    zero_stage = resolved_zero_stage(recipe)
    config = mixer_config(recipe, data.expert_names(recipe), pool)
    plan = plan_run(request.loaded, config, data, zero_stage, world, request.ds_path)
    base = load_base(recipe.base, packing=recipe.data.packing, zero3=zero_stage == 3)
    if zero_stage != 3:
        base.model.to(world.device)  # type: ignore[arg-type]
    mixture = attach_mixers(base.model, config, place_experts(plan, world))
    if pool is not None:
        fill_experts(mixture, pool)
    _check_same_data(world, data)
    once(world, lambda: claim_run_folder(request.loaded))
    counts = count_weights(mixture)
    once(world, lambda: write_json(folder.plan, plan.to_dict()))
    if plan.chosen.fits is False:
        _say(world, "\n".join((*plan.notes, *(f"would fit: {line}" for line in plan.remedies))))
    _announce(world, data, mixture, counts, zero_stage, time.perf_counter() - began)
    state = RunState(request.loaded, folder, world, mixture, data, stop_request, request.ds_path)
    return state, base


def mixer_config(recipe: Recipe, experts: Sequence[str], pool: Pool | None) -> MixerConfig:
    """The mixture that a recipe describes.

    Args:
        recipe: the run's.
        experts: names of the pool, in order.
        pool: ready-made adapters among them, whose ranks and alphas are their own.
    """
    mixer, stage2 = recipe.mixer, recipe.stage2
    specs = mixer.experts or ()
    ranks = {spec.name: spec.rank for spec in specs if spec.rank is not None}
    alphas = {spec.name: spec.alpha for spec in specs if spec.alpha is not None}
    if pool is not None:
        _check_written(recipe, ranks, alphas, pool)
        ranks, alphas = {**ranks, **pool.ranks}, {**alphas, **pool.alphas}
    return MixerConfig(
        targets=mixer.targets,
        experts=experts,
        rank=mixer.rank,
        alpha=mixer.alpha,
        ranks=ranks,
        alphas=alphas,
        dropout=mixer.dropout,
        rslora=pool.rslora if pool is not None else mixer.rslora,
        router=mixer.router,
        router_std=mixer.router_std,
        compute=mixer.compute,
        routing=stage2.routing,
        top_k=min(stage2.top_k, len(experts)),
        renormalize=stage2.renormalize,
        top_p=stage2.top_p,
        seed=recipe.run.seed,
    )


def _check_written(recipe: Recipe, ranks: dict[str, int], alphas: dict[str, float], pool: Pool) -> None:
    """Refuse a rank, alpha or scaling in the recipe that is not the adapter's own."""
    for key, written, own in (("rank", ranks, pool.ranks), ("alpha", alphas, pool.alphas)):
        for name in written.keys() & own.keys():
            if written[name] != own[name]:
                raise UserError(
                    f"{key} {written[name]} is written for {name}, and its adapter has {own[name]}",
                    where=f"mixer.experts: {name}",
                    fix=f"leave {key} out; it comes with the adapter",
                )
    if recipe.mixer.rslora and not pool.rslora:
        raise UserError(
            "rslora: true is written, and not every adapter is rsLoRA",
            where="mixer.rslora",
            fix="leave it out; the scale comes with the adapters",
        )


def _check_same_data(world: World, data: RunData) -> None:
    """Every rank must have read the same examples: their order decides who trains on what."""
    own = [(d.name, len(d.train), len(d.test)) for d in data.domains]
    if any(other != own for other in gather_objects(world, own)):
        raise UserError(
            "the ranks have read different data",
            where="data.domains",
            fix="give every node the same files, or put them on a shared file system",
        )


def _announce(
    world: World, data: RunData, mixture: Mixture, counts: WeightCounts, zero_stage: int, seconds: float
) -> None:
    if data.num_skipped:
        _say(world, f"{data.num_skipped:,} bad records skipped, see quarantine.jsonl in the run folder")
    total = counts.base + counts.experts + counts.routers
    examples = sum(len(domain.train) for domain in data.domains)
    _say(
        world,
        f"{len(data.domains)} domains with {examples:,} train examples ({len(data.router_examples):,} more "
        f"kept for the routers); {len(mixture.expert_names)} experts on {len(mixture.mixers)} projections: "
        f"{counts.experts:,} expert and {counts.routers:,} router weights beside {counts.base:,} of the "
        f"base ({100 * (counts.experts + counts.routers) / total:.3f} % of all); ZeRO {zero_stage} on "
        f"{world.size} rank{'s' * (world.size > 1)} ({world.device.type}); ready after {seconds:.0f} s",
    )


def _one_stage(state: RunState, base: LoadedBase, number: int, accumulation: int) -> StageEngine:
    recipe = state.loaded.recipe
    if number == 2:
        _take_stage_one(state)
    domains = state.data.domains
    examples: list[Example] = state.data.router_examples
    if number == 1:
        examples = [example for domain in domains for example in domain.train]
    stage = state.loaded.stage(f"stage{number}")
    data: StageData = stage_data(
        recipe,
        stage,
        examples,
        domains,
        base.tokenizer,
        state.world,
        accumulation,
        weighted=number == 1,
    )
    return run_stage(state, number, data)


def _take_stage_one(state: RunState) -> None:
    """The experts that stage one made, where this process has not just trained them itself."""
    if not state.loaded.recipe.stage1.enabled:
        return
    checkpoint = state.find_checkpoint(1)
    assert checkpoint is not None and checkpoint.state.finished
    if not hasattr(next(state.mixture.expert_parameters())[1], "ds_id"):
        load_weights(state.mixture, checkpoint.group("weights"))
