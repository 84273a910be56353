"""Take a run up again: where it goes on, and whether what is asked of it now is still the same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmixer.checkpoint.atomic import write_text
from dsmixer.checkpoint.publish import list_checkpoints
from dsmixer.checkpoint.restore import SavedCheckpoint
from dsmixer.checkpoint.schema import CONFIG, STEP_PATTERN, step_name, step_of
from dsmixer.config.changes import Changes, keep_rows, recipe_changes
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe
from dsmixer.training.checkpoints import Checkpoints
from dsmixer.training.run_folder import RunFolder, refuse_other_run
from dsmixer.training.world import World, once

SHOWN = 6


@dataclass(frozen=True)
class TakeUp:
    """What a start of a run knows of the starts before it.

    Attributes:
        loaded: the recipe, with the rows a step that the run has been taking.
        asked: the recipe as it was given.
        allow_changes: whether the mathematics may change.
        changes: how the recipe differs from that of the checkpoint it goes on from.
        start_from: what ``--from`` said.
        back_to: the checkpoint that it chose, where the run is still to be taken back to it.
    """

    loaded: LoadedRecipe
    asked: LoadedRecipe
    allow_changes: bool
    changes: Changes
    start_from: str | None = None
    back_to: Path | None = None


def take_up(
    world: World,
    checkpoints: Checkpoints,
    loaded: LoadedRecipe,
    stages: Sequence[int],
    *,
    start_from: str | None = None,
    allow_changes: bool = False,
    ds_path: str | None = None,
) -> TakeUp:
    """Find where a run goes on and hold the recipe against it; nothing is written. A collective.

    Args:
        world: the ranks.
        checkpoints: of the run.
        loaded: the recipe.
        stages: asked for in this call.
        start_from: the checkpoint to go on from, as given by the user; None: the newest.
        allow_changes: whether the mathematics may change.
        ds_path: a DeepSpeed JSON file from the command line.

    Raises:
        UserError: the mathematics differs and may not, the rows of a step can't be kept, or the checkpoint
            asked for is not one of this run, or is damaged.
    """
    folder = checkpoints.folder
    allowed = once(world, lambda: allow_changes)  # what rank 0 was asked, where commands are given by hand
    chosen = _chosen(world, checkpoints, stages, start_from)
    reference = chosen
    if reference is None and not folder.finished():
        reference = checkpoints.newest(2) or checkpoints.newest(1)
    changes = once(world, lambda: _changes(folder, reference, loaded, world.size))
    if changes.mathematics and not allowed:
        refuse_other_run(folder.config if reference is None else reference / CONFIG, changes.mathematics)
    kept = keep_rows(loaded, changes.rows, world.size, ds_path) if changes.rows else loaded
    return TakeUp(kept, loaded, allowed, changes, start_from, chosen)


def _changes(folder: RunFolder, reference: Path | None, loaded: LoadedRecipe, world_size: int) -> Changes:
    if reference is not None:
        saved = SavedCheckpoint(reference)
        return recipe_changes(saved.config, loaded, saved.state.rows, world_size)
    if folder.config.is_file():
        return recipe_changes(folder.config.read_text(encoding="utf-8"), loaded, None, world_size)
    return Changes()


def _chosen(
    world: World, checkpoints: Checkpoints, stages: Sequence[int], start_from: str | None
) -> Path | None:
    """The checkpoint that ``--from`` names, found to be whole; None where the newest is meant. A collective.

    A run that has been taken back to it already goes on from where it is: the same command resumes.
    """
    folder = checkpoints.folder

    def find() -> Path | None:
        if start_from is None or _gone_back(folder) == start_from:
            return None
        return find_checkpoint(folder, start_from, stages)

    path = once(world, find)
    if path is None:
        return None
    problem = checkpoints.damage(path)
    if problem is not None:
        raise UserError(problem, where="--from", fix="choose another checkpoint, or leave --from out")
    return path


def find_checkpoint(folder: RunFolder, asked: str, stages: Sequence[int]) -> Path:
    """The checkpoint folder that ``--from`` names.

    Args:
        folder: of the run.
        asked: a step of the stage that the run is in, ``stage1/step-00000100``, or a path.
        stages: asked for in this call.

    Raises:
        UserError: it is not there, is of another run or stage, or the run is finished.
    """
    there = {stage: list_checkpoints(folder.checkpoints(stage)) for stage in (1, 2)}
    begun = [stage for stage in stages if there[stage]]
    if asked.isdecimal():
        path = folder.checkpoints(begun[-1] if begun else stages[0]) / step_name(int(asked))
    else:
        inside = folder.path / "checkpoints" / asked
        path = inside if inside.is_dir() else Path(asked)
    of_stage = {folder.checkpoints(stage).resolve(): stage for stage in (1, 2)}
    stage = of_stage.get(path.resolve().parent)
    listed = [f"{p.parent.name}/{p.name}" for stage in (1, 2) for p in there[stage]]
    has = f"the run has {', '.join(listed[-SHOWN:])}" if listed else "the run has none yet; leave --from out"
    if stage is None or not STEP_PATTERN.match(path.name):
        raise UserError(f"{asked} is not a checkpoint of this run", where=f"--from: {folder.path}", fix=has)
    if not path.is_dir():
        raise UserError("there is no such checkpoint", where=f"--from: {path}", fix=has)
    if stage not in stages:
        raise UserError(
            f"the checkpoint is of stage {stage}, which this call does not run",
            where=f"--from: {path}",
            fix="leave --stages out, or choose a checkpoint of the stage",
        )
    if folder.finished():
        raise UserError(
            "this run is finished and its mixture published; going back would undo that",
            where=f"--from: {path}",
            fix=f"remove {folder.finished_mark} first, or choose another run.name and start anew",
        )
    return folder.checkpoints(stage) / path.name


def _mark(folder: RunFolder) -> Path:
    """Says what ``--from`` said when the run was last taken back; a start without it forgets that."""
    return folder.path / "checkpoints" / ".from"


def _gone_back(folder: RunFolder) -> str | None:
    mark = _mark(folder)
    return mark.read_text(encoding="utf-8").rstrip("\n") if mark.is_file() else None


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def carry_out(taken: TakeUp, checkpoints: Checkpoints) -> None:
    """Write down what a start changes in a run folder, once everything that was asked for is found good.

    On rank 0: the configuration; which changes were allowed and where; the way back to an older checkpoint.

    Raises:
        OSError: it can't be written.
    """
    folder = checkpoints.folder
    checkpoints.clear_unfinished()
    if taken.start_from is None:
        _mark(folder).unlink(missing_ok=True)
    if taken.back_to is not None:
        stage, step = int(taken.back_to.parent.name.removeprefix("stage")), step_of(taken.back_to.name)
        checkpoints.set_aside(checkpoints.after(stage, step))
        write_text(_mark(folder), f"{taken.start_from}\n")
    if taken.changes.mathematics:
        _note(folder, taken.changes.mathematics)
    text = dump_recipe(taken.asked.recipe)
    if folder.config.read_text(encoding="utf-8") != text:
        write_text(folder.config, text)


def _note(folder: RunFolder, changes: Sequence[str]) -> None:
    """Add to ``changes.jsonl`` what has been allowed to change, and after which checkpoints."""
    path = folder.path / "changes.jsonl"
    newest = [list_checkpoints(folder.checkpoints(stage)) for stage in (2, 1)]
    after = next((_name(paths[-1]) for paths in newest if paths), None)
    line = json.dumps({"after": after, "changes": list(changes)}, ensure_ascii=False)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if line not in before.splitlines():
        write_text(path, f"{before}{line}\n")


def told(taken: TakeUp, world_size: int) -> list[str]:
    """Lines for the user: what is not as it was, and what is kept."""
    lines = []
    changes = taken.changes
    if changes.layout:
        lines.append(f"changed, and the mathematics stays: {_shown(changes.layout)}")
    if changes.mathematics:
        lines.append(f"changed, as --allow-changes says: {_shown(changes.mathematics)}")
    for name, rows in changes.rows.items():
        micro = taken.loaded.stage(name).micro_batch_size
        lines.append(
            f"{name} keeps its {rows} rows a step: {rows // (world_size * micro)} accumulation steps on "
            f"{world_size} rank{'s' * (world_size > 1)}"
        )
    return lines


def _shown(changes: Sequence[str]) -> str:
    more = len(changes) - SHOWN
    return "; ".join(changes[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
