"""Which keys of a recipe may change while a run is under way, and how a run's global batch is kept.

What is in ``LAYOUT`` says where and how the same numbers are computed, how often something is written down,
or what happens after training. Everything else is the mathematics of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from dsmixer.config.batch import accumulation_steps
from dsmixer.config.ds_json import merge_ds_config
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import STAGES, LoadedRecipe, resolved_differences

LAYOUT = (
    "run.name",
    "run.dir",
    "run.log_every",
    "run.tensorboard",
    "run.wandb",
    "run.license",
    "base.attention",
    "base.activation_checkpointing",
    "data.cache_dir",
    "mixer.compute",
    "stage1.micro_batch_size",
    "stage2.micro_batch_size",
    "stage2.preserve.origin",
    "placement",
    "deepspeed",
    "checkpoint",
    "evaluation",
    "health",
)
"""Sections and keys that may change without a question: the results are the same but for rounding."""

ROWS = ("gradient_accumulation_steps", "global_batch_size")
"""Keys of a stage that may change where the rows of a step stay as many."""


BASE = ("base.model", "base.revision")
"""Where the base lies: layout as well, if its files are known to be the same."""


@dataclass(frozen=True)
class Changes:
    """How a recipe differs from the one that a run has been trained with, ``KEY: OLD there, NEW here``.

    Attributes:
        layout: what may change without a question.
        mathematics: what needs ``--allow-changes``.
        rows: of each stage whose global batch is kept although the recipe would now give another one.
    """

    layout: tuple[str, ...] = ()
    mathematics: tuple[str, ...] = ()
    rows: Mapping[str, int] = dataclasses.field(default_factory=dict)


def recipe_changes(
    saved: str, loaded: LoadedRecipe, rows: Mapping[str, int] | None, world_size: int
) -> Changes:
    """Hold a recipe against the configuration that a run was saved with.

    Args:
        saved: text of the saved configuration.
        loaded: the recipe now.
        rows: global batch of each stage as it was saved; None where nothing has been saved yet.
        world_size: ranks now.

    Raises:
        UserError: the saved text is no configuration.
    """
    every = resolved_differences(saved, loaded.recipe)
    may_change, kept = list(LAYOUT), {}
    for name in STAGES:
        keys = [f"{name}.{key}" for key in ROWS]
        if rows is None or name not in rows or not loaded.stage(name).enabled:
            continue
        asked = rows_asked(loaded, name, world_size)
        if asked == rows[name]:
            may_change += keys
        elif not any(change.startswith(f"{key}: ") for change in every for key in keys):
            kept[name] = rows[name]
    mathematics = resolved_differences(saved, loaded.recipe, ignore=may_change)
    layout = [change for change in every if change not in mathematics]
    return Changes(tuple(layout), tuple(mathematics), kept)


def names_same_base(changes: Changes) -> Changes:
    """The changes where the files of the base are those of before: its name is none of the mathematics."""
    moved = tuple(change for change in changes.mathematics if change.split(": ")[0] in BASE)
    mathematics = tuple(change for change in changes.mathematics if change not in moved)
    return dataclasses.replace(changes, layout=(*changes.layout, *moved), mathematics=mathematics)


def rows_asked(loaded: LoadedRecipe, name: str, world_size: int) -> int:
    """Rows a step of a stage by the recipe."""
    return accumulation_steps(loaded, name, world_size) * loaded.stage(name).micro_batch_size * world_size


def keep_rows(
    loaded: LoadedRecipe, rows: Mapping[str, int], world_size: int, ds_path: str | None = None
) -> LoadedRecipe:
    """The recipe with the accumulation that follows from the rows a run has been taking.

    Args:
        loaded: the recipe.
        rows: a step, of the stages whose global batch is to be kept.
        world_size: ranks now.
        ds_path: a DeepSpeed JSON file from the command line.

    Raises:
        UserError: the ranks and micro-batches do not divide the rows, or a DeepSpeed file says otherwise.
    """
    stages = {}
    for name, number in rows.items():
        stage = loaded.stage(name)
        at_once = world_size * stage.micro_batch_size
        if number % at_once:
            sizes = [n for n in range(1, stage.micro_batch_size) if number % (world_size * n) == 0]
            way = f"write {name}.micro_batch_size={sizes[-1]}, or " if sizes else ""
            raise UserError(
                f"this run takes {number} rows a step, and they cannot be dealt out to {world_size} ranks in "
                f"micro-batches of {stage.micro_batch_size}, {at_once} at a time",
                where=loaded.where(f"{name}.micro_batch_size"),
                fix=f"{way}start as many ranks as divide {number}; or go on with another number of rows: "
                f"{name}.global_batch_size=ROWS with --allow-changes",
            )
        update = {"global_batch_size": number, "gradient_accumulation_steps": None}
        stages[name] = stage.model_copy(update=update)
    kept = dataclasses.replace(loaded, recipe=loaded.recipe.model_copy(update=stages))
    merged, _ = merge_ds_config(kept, ds_path)
    for name in rows:
        if merged.stage(name) != kept.stage(name):
            raise UserError(
                f"this run takes {rows[name]} rows a step, and a DeepSpeed file gives {name} another batch",
                where=merged.where(f"{name}.gradient_accumulation_steps"),
                fix='write "auto" there for batch sizes and accumulation',
            )
    return kept
