"""Which checkpoint of its run a start goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsmixer.checkpoint.publish import list_checkpoints
from dsmixer.checkpoint.schema import STEP_PATTERN, step_name
from dsmixer.config.errors import UserError
from dsmixer.config.schema import Recipe
from dsmixer.training.checkpoints import Checkpoints
from dsmixer.training.run_folder import RunFolder
from dsmixer.training.world import World, once

SHOWN = 6


def standing(checkpoints: Checkpoints, recipe: Recipe) -> tuple[Path | None, bool]:
    """The checkpoint that a run goes on from; whether stage two is left without its experts. A collective."""
    second = checkpoints.newest(2)
    if stands_alone(checkpoints, recipe):
        return second, False
    first = checkpoints.newest(1)
    if second is None or _end_of_stage_one(checkpoints) is not None:
        return second or first, False
    return first, True


def stands_alone(checkpoints: Checkpoints, recipe: Recipe) -> bool:
    """Whether stage two has begun and needs nothing of stage one any more; a collective.

    Its checkpoints hold the experts where it trains them; frozen ones are those of the end of stage one.
    """
    has_experts = recipe.stage2.experts == "preserve" or not recipe.stage1.enabled
    return has_experts and checkpoints.newest(2) is not None


def _end_of_stage_one(checkpoints: Checkpoints) -> Path | None:
    """The last checkpoint of a finished stage one, if it is whole; an older one has other experts. A
    collective."""
    paths = checkpoints.listed(1)
    if not paths or checkpoints.damage(paths[-1]) is not None:
        return None
    return paths[-1] if checkpoints.open_at(paths[-1]).state.finished else None


def chosen_checkpoint(
    world: World, checkpoints: Checkpoints, recipe: Recipe, stages: Sequence[int], start_from: str | None
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
    needs_first = recipe.stage1.enabled and recipe.stage2.experts == "frozen"
    if path.parent == folder.checkpoints(2) and needs_first and _end_of_stage_one(checkpoints) is None:
        raise UserError(
            f"{name_of(path)} was trained over the frozen experts of the end of stage one, and no whole "
            "checkpoint has them",
            where="--from",
            fix="choose a checkpoint of stage one, or leave --from out",
        )
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


def mark_of(folder: RunFolder) -> Path:
    """Says what ``--from`` said when the run was last taken back; a start without it forgets that."""
    return folder.path / "checkpoints" / ".from"


def _gone_back(folder: RunFolder) -> str | None:
    mark = mark_of(folder)
    return mark.read_text(encoding="utf-8").rstrip("\n") if mark.is_file() else None


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
