"""The dictionary that the DeepSpeed engine gets, from the recipe and a DeepSpeed JSON file.

A value that only the file gives is taken into the recipe; one that both give must be the same.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from dsmixer.config.batch import accumulation_steps
from dsmixer.config.ds_file import AUTO, DsFile, read_ds_file
from dsmixer.config.errors import UserError
from dsmixer.config.explain import validate_recipe
from dsmixer.config.recipe import STAGES, LoadedRecipe, find_place, settle
from dsmixer.config.schema import Recipe
from dsmixer.config.stages import Stage2Config, StageConfig

STEPS_PER_PRINT = 10**9
"""So large that DeepSpeed never prints a step line: the loop prints its own."""

BUCKET_ELEMENTS = 2**25
"""Gradients reduced at a time, 128 MiB in float32; DeepSpeed's own 5e8 would take 2 GB."""

_STAGE_KEYS = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "clip",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas": "betas",
    "optimizer.params.eps": "eps",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
}
_SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_OPTIMIZERS = ("AdamW", "Adam")
_HARMLESS = (("warmup_min_lr", 0), ("warmup_type", "linear"), ("adam_w_mode", True), ("torch_adam", True))
"""Parameters of optimizer and scheduler blocks that say what happens here anyway."""


def merge_ds_config(loaded: LoadedRecipe, ds_path: str | None = None) -> tuple[LoadedRecipe, list[str]]:
    """Take into the recipe what the DeepSpeed JSON file decides and the user did not write elsewhere.

    Args:
        loaded: the recipe; its ``deepspeed.config`` names the file unless ``ds_path`` does.
        ds_path: a file from the command line, which stands over the recipe's.

    Returns:
        The recipe with those values, and warnings of one line each. Merging again changes nothing.

    Raises:
        UserError: for a bad file, and where file and recipe give different values (both are named).
    """
    path = ds_path or loaded.recipe.deepspeed.config
    if path is None:
        return loaded, []
    places = dict(loaded.places)
    if ds_path is not None:
        places["deepspeed.config"] = f"command line: --deepspeed_config {ds_path}"
    if not os.path.isfile(path):
        where = find_place(loaded.path, places, "deepspeed.config")
        fix = "write a file such as ds_configs/zero2.json"
        raise UserError(f"no such file: {path}", where=where, fix=fix)
    file = read_ds_file(path)
    updates = _taken_over(loaded, file, places)
    raw = loaded.recipe.model_dump(mode="json")
    for key, value in {"deepspeed.config": path, **updates}.items():
        _set(raw, key, _as_written(value))
    recipe = validate_recipe(raw, lambda key: find_place(loaded.path, places, key))
    warnings = []
    if file.get("bf16.enabled"):
        where = file.where("bf16.enabled")
        what = "what trains is float32, the engine has no bf16 mode"
        warnings.append(f"{where}: read as base.dtype: bfloat16; {what}")
    return settle(dataclasses.replace(loaded, recipe=recipe, places=places)), warnings


def with_zero_stage(loaded: LoadedRecipe, zero_stage: int) -> LoadedRecipe:
    """The recipe with the ZeRO stage that the plan decided where it was left open."""
    block = loaded.recipe.deepspeed.model_copy(update={"zero_stage": zero_stage})
    return dataclasses.replace(loaded, recipe=loaded.recipe.model_copy(update={"deepspeed": block}))


def resolved_zero_stage(recipe: Recipe) -> int:
    """The ZeRO stage: the one written, else 3 where the placement is ``weights`` and 2 otherwise.

    What a run takes where none is written is the plan's to say (``with_zero_stage``).
    """
    stage = recipe.deepspeed.zero_stage
    if isinstance(stage, int):
        return stage
    return 3 if recipe.placement.mode == "weights" else 2


def deepspeed_config(
    loaded: LoadedRecipe, stage: StageConfig, world_size: int, ds_path: str | None = None
) -> dict[str, Any]:
    """The configuration that ``deepspeed.initialize`` gets for one stage.

    It has no optimizer, scheduler or precision block and no clipping: the optimizer is a client of the engine
    and clips each expert by itself. Everything else of the file is handed on.

    Args:
        loaded: the recipe; merging the file into it before is allowed and changes nothing.
        stage: the recipe's ``stage1`` or ``stage2``.
        world_size: number of ranks.
        ds_path: a DeepSpeed JSON file from the command line, or None for the recipe's.

    Raises:
        UserError: as :func:`merge_ds_config` and :func:`dsmixer.config.batch.accumulation_steps`.
    """
    merged, _ = merge_ds_config(loaded, ds_path)
    name = "stage2" if isinstance(stage, Stage2Config) else "stage1"
    micro = merged.stage(name).micro_batch_size
    accumulation = accumulation_steps(merged, name, world_size)
    file = read_ds_file(merged.recipe.deepspeed.config)
    dropped = ("optimizer", "scheduler", "bf16", "fp16", "amp")
    config = {key: value for key, value in _without_auto(file.values).items() if key not in dropped}
    config.setdefault("steps_per_print", STEPS_PER_PRINT)
    return config | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_block(
            config.get("zero_optimization", {}), resolved_zero_stage(merged.recipe)
        ),
    }


def _zero_block(from_file: dict[str, Any], stage: int) -> dict[str, Any]:
    sizes = {"reduce_bucket_size": BUCKET_ELEMENTS}
    if stage < 3:
        sizes["allgather_bucket_size"] = BUCKET_ELEMENTS
    return {"contiguous_gradients": True, "reduce_scatter": True, **sizes, **from_file, "stage": stage}


def _taken_over(loaded: LoadedRecipe, file: DsFile, places: dict[str, str]) -> dict[str, Any]:
    """The recipe's keys that the file decides, with their values; their places go into ``places``."""
    updates: dict[str, Any] = {}
    for ds_key, key, value in _decided(file):
        left_open = _left_open(loaded, key)
        if not left_open and loaded.written[key] != _as_written(value):
            raise UserError(
                f"{key} is {loaded.written[key]!r} here and {file.get(ds_key)!r} in {file.where(ds_key)}",
                where=loaded.where(key),
                fix=f'write "auto" for {ds_key} in {file.path}, or the same value in both',
            )
        if updates.get(key, value) != value:
            raise UserError(
                f"{value} here and {updates[key]} in {places[key]} both set {key}",
                where=file.where(ds_key),
                fix='write "auto" for one of the two',
            )
        updates[key] = value
        if left_open:
            places[key] = file.where(ds_key)
    return updates


def _decided(file: DsFile) -> Iterator[tuple[str, str, Any]]:
    """What the file decides: its key, the recipe's key, the value in the recipe's terms."""
    _check_optimizer(file)
    for ds_key, field in _STAGE_KEYS.items():
        value = file.get(ds_key)
        if value is not None:
            if ds_key == "gradient_clipping" and value == 0:
                value = None
            for stage in STAGES:
                yield ds_key, f"{stage}.{field}", value
    scheduler = file.get("scheduler.type")
    if scheduler is not None:
        for stage in STAGES:
            yield "scheduler.type", f"{stage}.scheduler", _SCHEDULERS[scheduler]
    if file.get("zero_optimization.stage") is not None:
        yield "zero_optimization.stage", "deepspeed.zero_stage", file.get("zero_optimization.stage")
    if file.get("bf16.enabled"):
        yield "bf16.enabled", "base.dtype", "bfloat16"


def _check_optimizer(file: DsFile) -> None:
    """Refuse optimizers and schedules that the recipe cannot express."""
    for block, allowed in (("optimizer", _OPTIMIZERS), ("scheduler", tuple(_SCHEDULERS))):
        kind = file.get(f"{block}.type")
        if kind is not None and kind not in allowed:
            fix = f"write one of {', '.join(allowed)}, or remove the block: the recipe's stages decide"
            raise UserError(f"{kind!r} is not supported", where=file.where(f"{block}.type"), fix=fix)
        params = file.values.get(block, {}).get("params", {})
        for key in params if isinstance(params, dict) else {}:
            dotted = f"{block}.params.{key}"
            value = file.get(dotted)
            if value is not None and dotted not in _STAGE_KEYS and (key, value) not in _HARMLESS:
                where = file.where(dotted)
                fix = 'write "auto" or remove it: the recipe\'s stages decide'
                raise UserError(f"{value!r} is not supported", where=where, fix=fix)


def _left_open(loaded: LoadedRecipe, key: str) -> bool:
    """Whether the user wrote nothing for a key, or left it open (``clip: null`` means none, and does not)."""
    value = loaded.written.get(key, AUTO)
    return value == AUTO or (value is None and not key.endswith(".clip"))


def _as_written(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        raw = raw[section]
    raw[last] = value


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """A copy without the values that the file leaves to us, at any depth."""
    kept = {key: _without_auto(v) if isinstance(v, dict) else v for key, v in values.items() if v != AUTO}
    return copy.deepcopy(kept)
