"""Take a run up again: where it goes on, and whether what is asked of it now is still the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsmixer.checkpoint.atomic import write_text
from dsmixer.checkpoint.publish import list_checkpoints
from dsmixer.checkpoint.restore import SavedCheckpoint
from dsmixer.checkpoint.schema import CONFIG, CheckpointState, step_name
from dsmixer.config.changes import BASE, Changes, keep_rows, names_same_base, recipe_changes
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe
from dsmixer.training.checkpoints import Checkpoints
from dsmixer.training.data import StageData
from dsmixer.training.origins import base_changes, base_identity, version_changes
from dsmixer.training.run_folder import RunFolder, refuse_other_run
from dsmixer.training.standing import chosen_checkpoint, mark_of, name_of, standing
from dsmixer.training.world import World, once

SHOWN = 6


@dataclass(frozen=True)
class Seen:
    """What was in a run folder when it was read.

    Attributes:
        config: the text of its ``config.yaml``, None where there is none.
        checkpoints: their names, of both stages.
        finished: whether the run was done.
    """

    config: str | None
    checkpoints: tuple[str, ...]
    finished: bool


@dataclass(frozen=True)
class TakeUp:
    """What a start of a run knows of the starts before it.

    Attributes:
        loaded: the recipe, with the rows a step that the run has been taking.
        asked: the recipe as it was given.
        allow_changes: whether the mathematics may change.
        changes: how the recipe differs from that of the checkpoint it goes on from.
        start_from: what ``--from`` said.
        back_to: stage and step past which every checkpoint is still to be set aside; None: none is.
        orphaned: whether the experts that stage two was trained over, of the end of stage one, are not whole.
        saved: the state of the checkpoint it goes on from; None where there is none.
        base: digests of the base as it is here; None until they are known.
        seen: what was in the folder.
    """

    loaded: LoadedRecipe
    asked: LoadedRecipe
    allow_changes: bool
    changes: Changes
    start_from: str | None = None
    back_to: tuple[int, int] | None = None
    orphaned: bool = False
    saved: CheckpointState | None = None
    base: dict[str, str] | None = None
    seen: Seen | None = None


def look(folder: RunFolder) -> Seen:
    """What is in a run folder now."""
    config = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else None
    names = (name_of(path) for stage in (1, 2) for path in list_checkpoints(folder.checkpoints(stage)))
    return Seen(config, tuple(names), folder.finished())


def refuse_taken(folder: RunFolder, taken: TakeUp) -> None:
    """Refuse to go on from what is no longer there. On rank 0, which has the lock by now.

    Raises:
        UserError: another job has begun the run, or gone on with it, since ``take_up`` read its folder.
    """
    if taken.seen is not None and look(folder) != taken.seen:
        raise UserError(
            "another job has begun this run, or gone on with it, while this one was starting; nothing there "
            "was touched",
            where=str(folder.path),
            fix="run the same command again: it goes on from what is there now",
        )


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
        UserError: the mathematics differs and may not, the rows of a step can't be kept, the checkpoint
            asked for is not one of this run, or is damaged, or a stage has no whole one.
        UnreadableError: the system refuses to read a checkpoint.
    """
    folder, recipe = checkpoints.folder, loaded.recipe
    allowed = once(world, lambda: allow_changes)  # what rank 0 was asked, where commands are given by hand
    seen = checkpoints.read_once(lambda: look(folder))
    chosen = chosen_checkpoint(world, checkpoints, recipe, stages, start_from)
    reference, orphaned = chosen, False
    if reference is None and not seen.finished:
        reference, orphaned = standing(checkpoints, recipe)
    saved = None if reference is None else checkpoints.open_at(reference)
    changes = checkpoints.read_once(lambda: _changes(seen, saved, loaded, world.size))
    if changes.mathematics and not allowed:
        refuse_other_run(folder.config if reference is None else reference / CONFIG, changes.mathematics)
    kept = keep_rows(loaded, changes.rows, world.size, ds_path) if changes.rows else loaded
    state = None if saved is None else saved.state
    back_to = None
    if chosen is not None or orphaned:
        back_to = (1, 0) if state is None else (state.stage, state.step)
    return TakeUp(kept, loaded, allowed, changes, start_from, back_to, orphaned, state, seen=seen)


def _changes(seen: Seen, saved: SavedCheckpoint | None, loaded: LoadedRecipe, world_size: int) -> Changes:
    if saved is not None:
        changes = recipe_changes(saved.config, loaded, saved.state.rows, world_size)
        return names_same_base(changes) if _is_moved(changes, saved.state, loaded) else changes
    if seen.config is not None:
        return recipe_changes(seen.config, loaded, None, world_size)
    return Changes()


def _is_moved(changes: Changes, saved: CheckpointState, loaded: LoadedRecipe) -> bool:
    """Whether a base of another name has the files that the run was trained on."""
    if saved.base is None or not any(change.split(": ")[0] in BASE for change in changes.mathematics):
        return False
    return base_identity(loaded.recipe.base) == saved.base


def hold_base(checkpoints: Checkpoints, taken: TakeUp) -> TakeUp:
    """Hold the files of the base against those that the run was trained on; a collective.

    Raises:
        UserError: they are others, and the mathematics may not change.
    """
    if taken.base is not None:
        return taken
    base = once(checkpoints.world, lambda: base_identity(taken.loaded.recipe.base))
    if base is None:  # of the hub, and still to be downloaded
        return taken
    saved = taken.saved
    others = () if saved is None else base_changes(saved.base, base)
    if saved is not None and others and not taken.allow_changes:
        refuse_other_run(path_of(checkpoints, saved), others)
    changes = replace(taken.changes, mathematics=(*taken.changes.mathematics, *others))
    return replace(taken, base=base, changes=changes)


def hold_data(checkpoints: Checkpoints, taken: TakeUp, data: Mapping[int, StageData]) -> TakeUp:
    """Hold the data and their order against those of the checkpoint that the run goes on from.

    Args:
        checkpoints: of the run.
        taken: the start.
        data: of each enabled stage.

    Raises:
        UserError: they are others, and the mathematics may not change.
    """
    saved = taken.saved
    if saved is None or saved.stage not in data:
        return taken
    others = [
        f"data of stage {saved.stage}: {o}" for o in data[saved.stage].sampler.differences(saved.cursor)
    ]
    if others and not taken.allow_changes:
        refuse_other_run(path_of(checkpoints, saved), others)
    changes = replace(taken.changes, mathematics=(*taken.changes.mathematics, *others))
    return replace(taken, changes=changes)


def path_of(checkpoints: Checkpoints, saved: CheckpointState) -> Path:
    """The folder of a checkpoint of the run."""
    return checkpoints.folder.checkpoints(saved.stage) / step_name(saved.step)


def carry_out(taken: TakeUp, checkpoints: Checkpoints) -> None:
    """Write down what a start changes in a run folder, once everything that was asked for is found good.

    On rank 0: the configuration; which changes were allowed and where; the way back to an older checkpoint.

    Raises:
        OSError: it can't be written.
    """
    folder = checkpoints.folder
    checkpoints.clear_unfinished()
    if taken.start_from is None:
        mark_of(folder).unlink(missing_ok=True)
    if taken.back_to is not None:
        checkpoints.set_aside(checkpoints.after(*taken.back_to))
        if taken.start_from is not None:
            write_text(mark_of(folder), f"{taken.start_from}\n")
    if taken.changes.mathematics:
        _note(folder, taken.changes.mathematics)
    text = dump_recipe(taken.asked.recipe)
    if folder.config.read_text(encoding="utf-8") != text:
        write_text(folder.config, text)


def _note(folder: RunFolder, changes: Sequence[str]) -> None:
    """Add to ``changes.jsonl`` what has been allowed to change, and after which checkpoints."""
    path = folder.path / "changes.jsonl"
    newest = [list_checkpoints(folder.checkpoints(stage)) for stage in (2, 1)]
    after = next((name_of(paths[-1]) for paths in newest if paths), None)
    line = json.dumps({"after": after, "changes": list(changes)}, ensure_ascii=False)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if line not in before.splitlines():
        write_text(path, f"{before}{line}\n")


def told(taken: TakeUp, world_size: int) -> list[str]:
    """Lines for the user: what is not as it was, and what is kept."""
    lines, changes = [], taken.changes
    if taken.orphaned:
        lines.append(_told_orphaned(taken))
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
    return lines + _told_saved(taken, world_size)


def _told_orphaned(taken: TakeUp) -> str:
    where = "begins anew" if taken.saved is None else f"goes on after step {taken.saved.step}"
    return (
        "dsmixer: warning: stage two was trained over the frozen experts of the end of stage one, and no "
        f"whole checkpoint has them: stage one {where}, and stage two begins anew after it"
    )


def _told_saved(taken: TakeUp, world_size: int) -> list[str]:
    """How this start differs from the one that saved the checkpoint, beside the recipe."""
    saved, dropout = taken.saved, taken.loaded.recipe.mixer.dropout
    if saved is None:
        return []
    versions = version_changes(saved.versions)
    lines = [f"other versions than the checkpoint was saved with: {_shown(versions)}"] if versions else []
    before = saved.layout["ranks"]
    others = [f"ranks: {before} there, {world_size} here"] if before != world_size else []
    others += [change for change in taken.changes.layout if ".micro_batch_size: " in change]
    if others and dropout > 0:
        lines.append(
            f"mixer.dropout is {dropout}, and masks are drawn by rank and micro-batch: they are others than "
            f"without this change ({_shown(others)}), and so are the losses"
        )
    return lines


def _shown(changes: Sequence[str]) -> str:
    more = len(changes) - SHOWN
    return "; ".join(changes[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
