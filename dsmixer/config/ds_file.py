"""Reads a DeepSpeed JSON file, with the line of every key, and refuses what cannot work here."""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any

import yaml

from dsmixer.config.errors import UserError
from dsmixer.config.yaml_text import parse_yaml, read_text

AUTO = "auto"

_SWITCHED_OFF = {
    "fp16": "what trains is float32, and small gradients would be lost; write base.dtype: bfloat16",
    "amp": "what trains is float32; write base.dtype: bfloat16",
    "torch_autocast": "the mixers choose the types of their products; write base.dtype: bfloat16",
    "elasticity": "the batch is drawn from the seed alone; write global_batch_size in the recipe",
    "data_efficiency": "the recipe's data section decides what is trained on",
    "curriculum_learning": "the recipe's data section decides what is trained on",
    "bfloat16": "write bf16, or base.dtype: bfloat16 in the recipe",
    "progressive_layer_drop": "every layer is needed for the routing statistics",
}
"""Blocks that are refused when enabled, with the reason and the way out."""

_KNOWN = (
    *_SWITCHED_OFF,
    *(
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ),
    *("zero_optimization", "optimizer", "scheduler", "bf16", "steps_per_print", "wall_clock_breakdown"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type"),
    *("prescale_gradients", "sparse_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
    *("memory_breakdown", "activation_checkpointing", "flops_profiler", "comms_logger", "tensorboard"),
    *("data_types", "checkpoint", "aio", "dump_state"),
)
_BLOCKS = ("zero_optimization", "optimizer", "scheduler", "bf16", *_SWITCHED_OFF)
_KNOWN_ZERO = (
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions"),
    *("allgather_bucket_size", "overlap_comm", "round_robin_gradients", "offload_param", "offload_optimizer"),
    *("sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"),
)
"""The keys that a misspelt one is held against; DeepSpeed knows more, and those pass."""


@dataclasses.dataclass(frozen=True)
class DsFile:
    """A DeepSpeed configuration as its file gives it, with the line of every dotted key."""

    values: dict[str, Any]
    path: str | None
    lines: dict[str, int]

    def get(self, dotted: str) -> Any:
        """The value of a dotted key; None where it is absent or ``"auto"``, that is, left to the recipe."""
        node: Any = self.values
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return None if node == AUTO else node

    def where(self, dotted: str) -> str:
        """The place that an error about a dotted key names."""
        return (
            f"{self.path}:{self.lines[dotted]}: {dotted}"
            if dotted in self.lines
            else f"{self.path}: {dotted}"
        )


def read_ds_file(path: str | None) -> DsFile:
    """The DeepSpeed file at ``path``, checked; an empty one where ``path`` is None.

    Raises:
        UserError: for a file that cannot be read, is not a JSON object, writes a key twice, misspells
            one, or enables what cannot work here.
    """
    if path is None:
        return DsFile({}, None, {})
    text = read_text(path, "DeepSpeed configuration")
    try:
        values = json.loads(text, object_pairs_hook=lambda pairs: _without_duplicates(pairs, path))
    except json.JSONDecodeError as error:
        problem = f"malformed JSON at column {error.colno}: {error.msg}"
        raise UserError(problem, where=f"{path}:{error.lineno}", fix="correct the JSON there") from None
    if not isinstance(values, dict):
        raise UserError("a DeepSpeed configuration is a JSON object", where=path, fix="begin with {")
    file = DsFile(values, path, _lines(text, path))
    _check_blocks(file)
    return file


def _without_duplicates(pairs: list[tuple[str, Any]], path: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise UserError(f"{key!r} is written twice in one object", where=path, fix="keep one of the two")
        result[key] = value
    return result


def _lines(text: str, path: str) -> dict[str, int]:
    # JSON is YAML but for tabs, which stand only between tokens in it, and a few rare escapes.
    try:
        return parse_yaml(text.replace("\t", " "), path).lines
    except (UserError, yaml.YAMLError):
        return {}


def _check_blocks(file: DsFile) -> None:
    for key, value in file.values.items():
        if key in _BLOCKS and not isinstance(value, dict):
            fix = f'write "{key}": {{...}}'
            raise UserError(f"{value!r} is not an object", where=file.where(key), fix=fix)
    _check_spelling(file, "", _KNOWN)
    _check_spelling(file, "zero_optimization.", _KNOWN_ZERO)
    for key, reason in _SWITCHED_OFF.items():
        if file.get(f"{key}.enabled"):
            raise UserError("not supported", where=file.where(f"{key}.enabled"), fix=f"remove it: {reason}")
    if file.get("gradient_allreduce_op") not in (None, "mean"):
        where = file.where("gradient_allreduce_op")
        raise UserError("gradients are scaled for a mean over the ranks", where=where, fix="remove it")


def _check_spelling(file: DsFile, prefix: str, known: tuple[str, ...]) -> None:
    values = file.values.get("zero_optimization", {}) if prefix else file.values
    for key in values:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if near and key not in known:
            problem = f"DeepSpeed knows no key {key!r}"
            raise UserError(problem, where=file.where(prefix + key), fix=f"write {prefix}{near[0]}")
