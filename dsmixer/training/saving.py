"""Between a stage's engine and its checkpoints: each rank writes and reads its own part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from dsmixer.checkpoint.atomic import as_os_error
from dsmixer.checkpoint.parts import Source, file_entry, write_parts
from dsmixer.checkpoint.publish import (
    abandon_save,
    begin_save,
    building_folder,
    drop_old,
    finish_save,
    list_checkpoints,
)
from dsmixer.checkpoint.restore import SavedCheckpoint, Wanted, read_state
from dsmixer.checkpoint.retention import Retention
from dsmixer.checkpoint.schema import CheckpointState
from dsmixer.config.errors import UserError
from dsmixer.model.inject import Mixture
from dsmixer.placement import groups
from dsmixer.placement.pieces import is_bank, whole_shape
from dsmixer.placement.whole import whole_parameter
from dsmixer.training.engine import StageEngine
from dsmixer.training.lock import RunLock
from dsmixer.training.moments import KINDS, MomentPart
from dsmixer.training.origins import installed_versions
from dsmixer.training.together import keep_lock
from dsmixer.training.world import World, gather_objects

Result = TypeVar("Result")
Named = tuple[str, nn.Parameter]


class SaveError(RuntimeError):
    """A checkpoint could not be written; what was there before is untouched, on every rank."""


@dataclass(frozen=True)
class Save:
    """What a stage saves beside its engine's numbers.

    Attributes:
        folder: of the stage's checkpoints.
        stage, step, num_steps, rows, loss: as in ``CheckpointState``.
        cursor: of the sampler.
        config: the text of the run's configuration.
        usage: of the routers in the step before, in stage two.
        retention: which checkpoints stay.
        base: digests of the base.
        lock: of the run folder; None: nobody else works there.
    """

    folder: Path
    stage: int
    step: int
    num_steps: int
    rows: Mapping[str, int]
    loss: float | None
    cursor: Mapping[str, Any]
    config: str
    usage: torch.Tensor | None
    retention: Retention
    base: Mapping[str, str] | None = None
    lock: RunLock | None = None


def save_checkpoint(world: World, engine: StageEngine, save: Save) -> Path:
    """Save a stage; a collective. Each rank writes its part at the same time, rank 0 publishes.

    Nothing is gathered: a rank writes, of the experts it speaks for, the elements in its own partitions.

    Raises:
        SaveError: on every rank, where any of them could not write.
        LockLostError: on every rank; another job has the folder, and nothing more was written.
    """
    keep_lock(world, save.lock)
    sources = list(_sources(engine))
    needed = sum(gather_objects(world, sum(source.num_bytes for source in sources)))
    try:
        _together(world, save.folder, _on_first(world, lambda: begin_save(save.folder, save.step, needed)))
        entries = _together(world, save.folder, lambda: _write_own(world, sources, save))
        whole = {name: entry for of_rank in entries for name, entry in of_rank.items()}
        state = _state(world, engine, save)
        keep_lock(world, save.lock)
        publish = _on_first(world, lambda: finish_save(save.folder, state, save.config, whole))
        path = _together(world, save.folder, publish)[0]
    except SaveError:
        if world.rank == 0:
            abandon_save(save.folder, save.step)
        raise
    if world.rank == 0:
        with suppress(OSError):  # the checkpoint is there; an old one more does no harm
            drop_old(save.folder, save.retention, _losses(save.folder))
    assert path is not None
    return path


def _sources(engine: StageEngine) -> Iterator[Source]:
    """What this rank saves, without a copy."""
    optimizer, shards = engine.optimizer, engine.shards
    names = engine.mixture.expert_names
    flats: list[dict[str, torch.Tensor | MomentPart]] = [{"weights": shard.flat()} for shard in shards]
    for index, own in enumerate(flats):
        own |= {kind: optimizer.moments.part(kind, index) for kind in KINDS}
        if optimizer.origin is not None:
            own["origin"] = optimizer.origin[index]
    for index, name, run in engine.runs_to_save():
        expert = None if run.unit is None else names[run.unit]
        where = slice(run.flat_start, run.flat_start + run.numel)
        tensors = {kind: flat[where] for kind, flat in flats[index].items()}
        yield Source(name, expert, run.inside, tensors)


def _write_own(world: World, sources: list[Source], save: Save) -> dict[str, dict[str, Any]]:
    """This rank's files, with sizes and checksums."""
    building = building_folder(save.folder, save.step)
    building.mkdir(exist_ok=True)  # a network file system may show it late
    small = {"usage": save.usage} if save.usage is not None and world.rank == 0 else None
    names = write_parts(building, world.rank, sources, small)
    return {name: file_entry(building / name) for name in names}


def _state(world: World, engine: StageEngine, save: Save) -> CheckpointState:
    return CheckpointState(
        stage=save.stage,
        step=save.step,
        num_steps=save.num_steps,
        experts=list(engine.mixture.expert_names),
        ranks=list(engine.mixture.config.rank_list),
        shapes=whole_shapes(engine.mixture, _trained(engine.mixture)),
        unit_steps=engine.optimizer.steps.tolist(),
        cursor=dict(save.cursor),
        rows=dict(save.rows),
        loss=save.loss if save.loss is not None and math.isfinite(save.loss) else None,
        layout={
            "ranks": world.size,
            "zero_stage": groups.zero_stage(engine.engine),
            "expert_parallel_size": engine.mixture.placement.layout.size,
        },
        versions=installed_versions(),
        base=None if save.base is None else dict(save.base),
    )


def _trained(mixture: Mixture) -> list[Named]:
    named = [*mixture.expert_parameters(), *mixture.router_parameters()]
    return [(name, parameter) for name, parameter in named if parameter.requires_grad]


def whole_shapes(mixture: Mixture, named: Sequence[Named]) -> dict[str, list[int]]:
    """Shape of parameters over all ranks, by name."""
    layout = mixture.placement.layout
    return {name: list(whole_shape(name, groups.full_shape(p), layout)) for name, p in named}


def _losses(folder: Path) -> dict[int, float | None]:
    """Loss of each checkpoint of a stage by its step; what can't be read is not known."""
    found: dict[int, float | None] = {}
    for path in list_checkpoints(folder):
        with suppress(OSError, ValueError):  # UserError is a ValueError: another format
            state = read_state(path)
            found[state.step] = state.loss
    return found


def _on_first(world: World, work: Callable[[], Result]) -> Callable[[], Result | None]:
    return work if world.rank == 0 else lambda: None


def _together(world: World, folder: Path, work: Callable[[], Result]) -> list[Result]:
    """Do a part of a save on every rank; the ranks' results, or one error on all of them."""
    result, problem = None, None
    try:
        result = work()
    except (OSError, SafetensorError) as error:
        known = as_os_error(error, folder)
        problem = f"{known.strerror} ({known.filename}, rank {world.rank})"
    outcomes = gather_objects(world, (result, problem))
    problems = [problem for _, problem in outcomes if problem is not None]
    if problems:
        raise SaveError("; ".join(problems[:2]))
    return [result for result, _ in outcomes]  # type: ignore[misc]


def check_fits(saved: SavedCheckpoint, mixture: Mixture, named: Sequence[Named]) -> None:
    """Refuse a checkpoint of another pool or other projections.

    Args:
        saved: the checkpoint.
        mixture: that is to take it.
        named: the parameters that a checkpoint of this stage has.

    Raises:
        UserError: names the first difference.
    """
    there, names, shapes = saved.state, list(mixture.expert_names), whole_shapes(mixture, named)
    problems = []
    if there.experts != names:
        problems = [f"it has the experts {', '.join(there.experts)}, this recipe {', '.join(names)}"]
    elif there.ranks != (ranks := list(mixture.config.rank_list)):
        problems = [f"its experts have the ranks {there.ranks}, those of this recipe {ranks}"]
    for name in sorted(there.shapes.keys() | shapes.keys()):
        told, here = there.shapes.get(name, "not there"), shapes.get(name, "not trained")
        if told != here:
            problems.append(f"{name} is {told} in it and {here} in this recipe")
    if problems:
        raise UserError(
            f"the checkpoint does not fit: {problems[0]}",
            where=str(saved.path),
            fix="give the recipe the values of the run, or choose another run.name",
        )


def restore_optimizer(engine: StageEngine, saved: SavedCheckpoint) -> None:
    """Moments, step counts and theta(0) of a checkpoint into a fresh engine, whatever its layout."""
    optimizer = engine.optimizer
    for kind in KINDS:
        flats = [optimizer.moments.flat(kind, index) for index in range(len(engine.shards))]
        saved.fill(kind, _wanted(engine, flats.__getitem__))
        for index, flat in enumerate(flats):
            optimizer.moments.fill(kind, index, flat)
    optimizer.steps.copy_(torch.tensor(saved.state.unit_steps))
    if "origin" in saved.kinds():
        optimizer.hold_origin()
        origin = optimizer.origin
        assert origin is not None
        saved.fill("origin", _wanted(engine, origin.__getitem__))


def _wanted(engine: StageEngine, flat_of: Callable[[int], torch.Tensor]) -> Iterator[Wanted]:
    """Everything in this rank's shards; ``flat_of`` gives a shard's flat tensor."""
    names = engine.mixture.expert_names
    for index, name, run in engine.runs():
        expert = None if run.unit is None else names[run.unit]
        yield Wanted(name, expert, run.inside, run.of_flat(flat_of(index)))


def load_weights(mixture: Mixture, saved: SavedCheckpoint) -> None:
    """Weights of a checkpoint into a mixture that has no engine; a collective where ZeRO-3 partitioned it."""
    _load(mixture, saved, "weights", [*mixture.expert_parameters(), *mixture.router_parameters()])


def load_experts(mixture: Mixture, saved: SavedCheckpoint, kind: str) -> None:
    """``weights`` of a checkpoint's experts, or their ``origin``, into a mixture, also inside an engine that
    makes no more steps; a collective where ZeRO-3 partitioned it."""
    _load(mixture, saved, kind, list(mixture.expert_parameters()))


def _load(mixture: Mixture, saved: SavedCheckpoint, kind: str, named: Sequence[Named]) -> None:
    own = dict(named)
    local = [mixture.expert_names[expert] for expert in mixture.placement.layout.local]

    def fill(name: str, tensor: torch.Tensor) -> None:
        rows: list[tuple[str | None, torch.Tensor]] = [(None, tensor.view(-1))]
        if is_bank(name):
            rows = list(zip(local, tensor.view(len(local), -1), strict=True))
        saved.fill(kind, (Wanted(name, expert, 0, row) for expert, row in rows))

    for name in saved.state.shapes:
        if name in own:
            groups.fill_parameter(own[name], partial(fill, name))


def whole_weights(mixture: Mixture) -> dict[str, torch.Tensor]:
    """All experts and routers, whole, on the CPU of rank 0, by parameter name; a collective."""
    found = {}
    for name, parameter in [*mixture.expert_parameters(), *mixture.router_parameters()]:
        tensor = whole_parameter(name, parameter, mixture.placement)
        if dist.get_rank() == 0:
            found[name] = tensor
    return found
