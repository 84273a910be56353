"""A whole run: data, base, mixers, stage one, stage two, the published mixture, its evaluation and report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from dsmixer.adapters.importing import Pool, base_mismatches, parts_left_out
from dsmixer.checkpoint.atomic import write_json
from dsmixer.config.batch import check_world
from dsmixer.config.ds_json import deepspeed_config, with_zero_stage
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe
from dsmixer.config.schema import Recipe
from dsmixer.model.count import WeightCounts, count_weights
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.load import LoadedBase, load_base, load_tokenizer
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.placement.plan import Plan
from dsmixer.training.checkpoints import Checkpoints
from dsmixer.training.data import RunData, StageData, stage_data
from dsmixer.training.finish import finish_run
from dsmixer.training.form_table import keep_table
from dsmixer.training.health import Stopped, StopRequest
from dsmixer.training.heartbeat import watching
from dsmixer.training.leaving import telling_disks
from dsmixer.training.lock import RunLock
from dsmixer.training.nodes import fetch_on_nodes
from dsmixer.training.nonfinite import nonfinite_policy
from dsmixer.training.placing import place_experts, plan_run, settle_weights
from dsmixer.training.planning import first_stage
from dsmixer.training.preflight import check_stage_order, read_inputs
from dsmixer.training.profile.steps import ProfileRequest
from dsmixer.training.pulse import Pulse
from dsmixer.training.ranks import check_ranks, check_shared_folder
from dsmixer.training.resume import (
    TakeUp,
    carry_out,
    hold_base,
    hold_data,
    path_of,
    refuse_taken,
    take_up,
    told,
)
from dsmixer.training.run_folder import RunFolder, claim_run_folder, find_run_folder
from dsmixer.training.run_state import RunState
from dsmixer.training.same_data import check_same_data, check_same_tokens
from dsmixer.training.saving import check_fits, load_weights
from dsmixer.training.stage_run import run_stage, trainable
from dsmixer.training.standing import stands_alone
from dsmixer.training.telling import tell
from dsmixer.training.together import keep_lock
from dsmixer.training.world import World, gather_objects, join_world, once


@dataclass(frozen=True)
class RunRequest:
    """What the command line asked for.

    Attributes:
        loaded: the checked recipe, DeepSpeed file merged in.
        stages: the stages to run now, of those that the recipe enables.
        ds_path: a DeepSpeed JSON file from the command line.
        start_from: the checkpoint to go on from, by step or path; None: the newest.
        allow_changes: whether a run may go on with other mathematics than before.
        profile: the steps of each stage to profile.
    """

    loaded: LoadedRecipe
    stages: tuple[int, ...] = (1, 2)
    ds_path: str | None = None
    start_from: str | None = None
    allow_changes: bool = False
    profile: ProfileRequest = field(default_factory=ProfileRequest)


def train(request: RunRequest) -> None:
    """Do what is left of a run; does nothing where all is done.

    Raises:
        UserError: a mistake in what the user gave.
        RunError: the ranks did not come together, or a machine or a disk failed.
        Stopped: a signal came; everything trained is saved and can be taken up again.
        NonFiniteError: a loss or gradient was not finite.
        SaveError: the end of a stage could not be saved.
        UnreadableError: a checkpoint can't be read now.
        LockLostError: another job has the run folder now.
    """
    health, stages = request.loaded.recipe.health, _stages_of(request)
    world = join_world(max(health.hang_timeout + 30.0, 60.0))
    stop_request = StopRequest()
    with stop_request.listening(), watching(world, health) as pulse, telling_disks(pulse):
        try:
            _train(request, stages, world, stop_request, pulse)
        finally:
            stop_request.at_once = ""  # a rank that leaves is told no other reason on its way


def _train(
    request: RunRequest, stages: list[int], world: World, stop_request: StopRequest, pulse: Pulse
) -> None:
    """The run itself, while the ranks watch over each other."""
    stop_request.at_once = "stopped before training"
    recipe = request.loaded.recipe
    check_ranks(world, request.loaded, stages)
    check_world(request.loaded, world.size)
    folder = once(world, lambda: find_run_folder(request.loaded))
    check_shared_folder(world, folder.path)
    lock = RunLock(folder.lock)
    once(world, lambda: _lock_begun(folder, lock))
    with lock:
        checkpoints = Checkpoints(world, folder, partial(_say, world))
        pulse.enter("looking at checkpoints")
        taken = take_up(
            world,
            checkpoints,
            request.loaded,
            stages,
            start_from=request.start_from,
            allow_changes=request.allow_changes,
            ds_path=request.ds_path,
        )
        check_stage_order(recipe, stages, checkpoints)
        if once(world, folder.finished):
            _say(world, f"{folder.path} is finished; its report is {folder.report}")
            return
        pulse.enter("downloading")
        fetch_on_nodes(world, recipe)
        pulse.enter("setting up")
        state, base, stage_tokens = _set_up(request, taken, checkpoints, stop_request, lock)
        state.pulse, state.nonfinite = pulse, nonfinite_policy(recipe.health, checkpoints)
        state.profile = request.profile
        pulse.begun = True
        engine = None
        for number in _stages_left(state, stages, stage_tokens):
            if engine is not None:
                engine.release()
            elif number == 2 and recipe.stage1.enabled:
                _take_stage_one(state)
            engine = run_stage(state, number, stage_tokens[number])
        # no loop looks at the request any more
        _stop_if_asked(world, stop_request, "stopped after training; everything trained is saved")
        pulse.give_time()
        if _left_for_later(request):
            _say(world, f"stage {_left_for_later(request)} is left for another call of the same command")
            return
        assert engine is not None
        finish_run(state, base, engine)


def _stop_if_asked(world: World, stop_request: StopRequest, problem: str) -> None:
    """From now on a signal ends the run on the spot, and here all ranks where one has come to any before."""
    stop_request.at_once = problem
    if any(gather_objects(world, stop_request.signal)):
        raise Stopped(problem)


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        tell(text)


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


def _stages_left(state: RunState, stages: list[int], data: dict[int, StageData]) -> list[int]:
    """Of the stages to run, those that are: stage one needs no engine again where stage two only wants its
    experts. Once stage two has begun, stage one is what it was."""
    if 1 not in stages:
        return stages
    # where the experts that it needs are lost, stage two has been set aside
    if state.loaded.recipe.stage2.enabled and state.checkpoints.newest(2) is not None:
        return [number for number in stages if number > 1]
    saved = state.checkpoints.open(1)
    done = saved is not None and saved.state.step >= data[1].sampler.num_steps
    return [2] if done and 2 in stages else stages


def _left_for_later(request: RunRequest) -> int | None:
    """An enabled stage after those of this call."""
    later = [n for n in _enabled(request.loaded.recipe) if n > max(_stages_of(request))]
    return later[0] if later else None


def _set_up(
    request: RunRequest,
    taken: TakeUp,
    checkpoints: Checkpoints,
    stop_request: StopRequest,
    lock: RunLock,
) -> tuple[RunState, LoadedBase, dict[int, StageData]]:
    """Data and their tokens, the plan, and the base model with mixers."""
    loaded, recipe = taken.loaded, taken.loaded.recipe
    world, folder = checkpoints.world, checkpoints.folder
    began = time.perf_counter()
    taken = hold_base(checkpoints, taken)
    data, start = read_inputs(loaded, folder.quarantine if world.rank == 0 else None, world.device)
    check_same_data(world, data)
    experts = data.expert_names(recipe)
    config = mixer_config(recipe, experts, start.pool)
    tokenizer = load_tokenizer(recipe.base.model, recipe.base.revision)
    tokens = {n: stage_data(loaded, n, data, experts, tokenizer, world) for n in _enabled(recipe)}
    check_same_tokens(world, data, tokens)
    taken = hold_data(checkpoints, taken, tokens)
    slots = tokens[1].sampler.slots if 1 in tokens else None
    plan = plan_run(loaded, config, slots, world, request.ds_path)
    planned = with_zero_stage(loaded, plan.zero_stage)
    ds_config = deepspeed_config(planned, first_stage(planned), world.size, request.ds_path)
    zero3 = ds_config["zero_optimization"] if plan.zero_stage == 3 else None
    base = load_base(recipe.base, packing=recipe.data.packing, zero3=zero3, device=world.device)
    placement = place_experts(plan, world)
    settle = settle_weights(planned, config, placement, start, world, request.ds_path)
    mixture = attach_mixers(base.model, config, placement, settle)
    _check_saved(checkpoints, taken, mixture)
    taken = hold_base(checkpoints, taken)  # of one that has only now been downloaded
    stop_request.at_once = ""  # the run folder is written now, and what is begun is saved
    keep_lock(world, lock)
    lock.when_lost = stop_request.ask
    once(world, lambda: _claim(taken, checkpoints, lock))
    counts = count_weights(mixture)
    once(world, lambda: write_json(folder.plan, plan.to_dict()))
    keep_table(world, folder.forms, mixture)
    if plan.chosen.fits is False:
        _say(world, "\n".join((*plan.notes, *(f"would fit: {line}" for line in plan.remedies))))
    if start.pool is not None:
        notes = base_mismatches(start.pool, recipe.base.model, config=base.model.config)
        for line in notes + parts_left_out(start.pool, base.model.config):
            _say(world, f"note: {line}")
    _announce(world, data, mixture, counts, plan, time.perf_counter() - began)
    state = RunState(planned, taken, checkpoints, world, mixture, data, stop_request, request.ds_path, lock)
    size = plan.expert_parallel_size
    return state, base, {n: replace(stage, expert_parallel_size=size) for n, stage in tokens.items()}


def _check_saved(checkpoints: Checkpoints, taken: TakeUp, mixture: Mixture) -> None:
    """Refuse a checkpoint of another pool or other projections before anything is written; a collective."""
    if taken.saved is None or taken.saved.stage not in _enabled(taken.loaded.recipe):
        return
    saved = checkpoints.open_at(path_of(checkpoints, taken.saved))
    check_fits(saved, mixture, trainable(mixture, taken.loaded.stage(f"stage{saved.state.stage}")))


def _lock_begun(folder: RunFolder, lock: RunLock) -> None:
    """Take the lock of a run that is under way. On rank 0; a new run takes it when it makes its folder."""
    if folder.path.is_dir() and not folder.finished():
        lock.take()


def _claim(taken: TakeUp, checkpoints: Checkpoints, lock: RunLock) -> None:
    """Write down what this start changes in the run folder, and say it. On rank 0."""
    lock.take()
    refuse_taken(checkpoints.folder, taken)
    claim_run_folder(taken.asked)
    for line in told(taken, checkpoints.world.size):
        tell(line)
    carry_out(taken, checkpoints)


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
        routing=stage2.inference_routing or stage2.routing,
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


def _announce(
    world: World, data: RunData, mixture: Mixture, counts: WeightCounts, plan: Plan, seconds: float
) -> None:
    if data.num_skipped:
        _say(world, f"{data.num_skipped:,} bad records skipped, see quarantine.jsonl in the run folder")
    total = counts.base + counts.experts + counts.routers
    examples = sum(len(domain.train) for domain in data.domains)
    _say(
        world,
        f"{len(data.domains)} domains with {examples:,} train examples ({len(data.router_examples):,} more "
        f"for the routers); {len(mixture.expert_names)} experts on {len(mixture.mixers)} projections: "
        f"{counts.experts:,} expert and {counts.routers:,} router weights beside {counts.base:,} of the "
        f"base ({100 * (counts.experts + counts.routers) / total:.3f} % of all); {plan.mode} with ZeRO "
        f"{plan.zero_stage} on {world.size} rank{'s' * (world.size > 1)} ({world.device.type}); ready after "
        f"{seconds:.0f} s",
    )


def _take_stage_one(state: RunState) -> None:
    """The experts that stage one made, where this process has not just trained them itself."""
    if stands_alone(state.checkpoints, state.loaded.recipe):
        return
    saved = state.checkpoints.open(1)
    assert saved is not None
    check_fits(saved, state.mixture, list(state.mixture.expert_parameters()))
    load_weights(state.mixture, saved)
