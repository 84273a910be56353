"""Rows a step: of micro-batch, accumulation, global batch and world size, one follows from the others."""

from __future__ import annotations

from dsmixer.config.errors import UserError
from dsmixer.config.recipe import STAGES, LoadedRecipe


def accumulation_steps(loaded: LoadedRecipe, stage: str, world_size: int) -> int:
    """Micro-batches an optimizer step of ``stage1`` or ``stage2`` on ``world_size`` ranks.

    Raises:
        UserError: where ``global_batch_size`` rows cannot be dealt out, or an accumulation that was written
            differs from the one that follows.
    """
    config = loaded.stage(stage)
    rows, written = config.global_batch_size, config.gradient_accumulation_steps
    key = f"{stage}.global_batch_size"
    if rows is None:
        if written is None:
            where = loaded.where(f"{stage}.gradient_accumulation_steps")
            fix = f"write a number, or {key} in rows"
            raise UserError("neither accumulation nor the global batch size is given", where=where, fix=fix)
        return written
    at_once = world_size * config.micro_batch_size
    if rows % at_once:
        below, above = rows // at_once * at_once, (rows // at_once + 1) * at_once
        near = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"{rows} rows cannot be dealt out to {world_size} ranks in micro-batches of "
            f"{config.micro_batch_size} ({stage}.micro_batch_size), {at_once} rows at a time",
            where=loaded.where(key),
            fix=f"write {near}, or change the micro-batch or the number of ranks",
        )
    if written is not None and written != rows // at_once:
        other = loaded.where(f"{stage}.gradient_accumulation_steps")
        raise UserError(
            f"{rows} rows a step on {world_size} ranks in micro-batches of {config.micro_batch_size} need "
            f"{rows // at_once} accumulation steps, and {written} are written in {other}",
            where=loaded.where(key),
            fix="remove one of the two",
        )
    return rows // at_once


def check_world(loaded: LoadedRecipe, world_size: int) -> dict[str, int]:
    """The checks that need the world size; the accumulation steps of each enabled stage by its name.

    Raises:
        UserError: as :func:`accumulation_steps`.
    """
    return {
        name: accumulation_steps(loaded, name, world_size) for name in STAGES if loaded.stage(name).enabled
    }
