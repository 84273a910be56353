"""What ``adapter_config.json`` may say for its adapter to be an expert: a sum of low rank, nothing more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, LoraConfig

from dsmixer.adapters.target_rule import MAX_NAMES, check_rule
from dsmixer.adapters.untrusted import printable, read_json_object, regular_size, shown
from dsmixer.config.errors import UserError

CONFIG_FILE = "adapter_config.json"
FORMS = ("LORA", "ADALORA")
MAX_RANK = 2**16
MAX_PARTS = 8
"""Parts of a fused projection that ``enable_lora`` may name; there were three."""

# what plain LoRA is made of, and what says nothing about the weights' meaning
PLAIN_KEYS = frozenset(
    ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
    + ("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora")
    + ("fan_in_fan_out", "bias", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern")
    + ("alpha_pattern", "megatron_core", "qalora_group_size", "merge_weights", "ensure_weight_tying")
    + ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
    # judged by the weights, which say what was trained: low_rank_forms.py
    + ("lora_bias", "enable_lora")
)
ADALORA_KEYS = frozenset(
    ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
)
"""Of AdaLoRA's training, but for ``init_r``, which is in its scale."""

WITHOUT = "train it again without that, or merge it into its base and use the result as the base"
REASONS = {
    "use_dora": "it is DoRA, which rescales the base's own weights by magnitude vectors, so it is no sum "
    "beside them",
    "modules_to_save": "it replaces whole modules of the base",
    "trainable_token_indices": "it changes token embeddings",
    "target_parameters": "it adapts bare parameters, not projections",
    "layer_replication": "it changes the number of the base's layers",
    "alora_invocation_tokens": "it is aLoRA, which acts only after certain tokens",
    "use_qalora": "it is QALoRA, which averages its inputs in groups",
    "use_bdlora": "it is BD-LoRA, which stores one of its factors as blocks",
    "kasa_config": "it is KaSA, which cuts singular values off the base's own weights",
}
# starts that leave the base's weights as they are; the others subtract from them (PiSSA, OLoRA, LoftQ, ...)
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
CONVERTIBLE_STARTS = ("pissa", "olora", "corda", "lora_ga")
CONVERT = (
    "save it again in PEFT with save_pretrained(FOLDER, path_initial_model_for_weight_conversion="
    "FOLDER_OF_THE_UNTRAINED_ADAPTER), which makes it plain LoRA"
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The folder's ``adapter_config.json``.

    Raises:
        UserError: it is not there, can't be read, or describes what no expert can compute.
    """
    path = folder / CONFIG_FILE
    if regular_size(path) is None:
        there = folder.is_dir()
        raise UserError(
            f"the folder has no {CONFIG_FILE}" if there else "no such folder",
            where=shown(folder),
            fix="give the folder of a PEFT LoRA adapter, or a hub id, OWNER/NAME",
        )
    config = read_json_object(path)
    where = shown(path)
    _check_kind(config, where)
    _check_numbers(config, where)
    check_rule(config, where)
    return config


def is_adalora(config: Mapping[str, Any]) -> bool:
    """Whether the weights are AdaLoRA's, ``B diag(E) A``."""
    return config["peft_type"] == "ADALORA"


def _refuse(where: str, key: str, problem: str, fix: str = WITHOUT) -> None:
    raise UserError(problem, where=f"{where}: {key}", fix=fix)


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind not in FORMS:
        only = "and only LORA and ADALORA can be an expert"
        _refuse(where, "peft_type", f"the adapter is {printable(repr(kind), 40)}, {only}", "train plain LoRA")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() == "gaussian":  # the one that PEFT reads in any case
        start = "gaussian"
    if not isinstance(start, str | bool | None) or start not in PLAIN_STARTS:
        _refuse_start(start, where)
    plain = PLAIN_KEYS | ADALORA_KEYS if kind == "ADALORA" else PLAIN_KEYS
    for key, value in config.items():
        if value and key not in plain and value != _defaults(str(kind)).get(key):
            reason = REASONS.get(key, f"it uses {printable(key, 60)}, which is not known here")
            _refuse(where, printable(key, 60), f"the adapter can't be an expert as it is: {reason}")


def _refuse_start(start: Any, where: str) -> None:
    name = start.lower() if isinstance(start, str) else ""
    convertible = name.startswith(CONVERTIBLE_STARTS)
    what = "is not known here, and may have changed the base's weights"
    if convertible or name == "loftq":
        what = "changed the base's weights, and an expert must not"
    _refuse(
        where,
        "init_lora_weights",
        f"{printable(repr(start), 40)} {what}",
        CONVERT if convertible else "train plain LoRA on the unchanged base",
    )


@cache
def _defaults(kind: str) -> dict[str, Any]:
    """What PEFT writes for a setting that nobody touched."""
    fields = dataclasses.fields(AdaLoraConfig if kind == "ADALORA" else LoraConfig)
    return {field.name: field.default for field in fields}


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    adalora = is_adalora(config)
    rank_key = "init_r" if adalora else "r"
    ranks = {rank_key: config.get(rank_key), **_pattern(config, "rank_pattern", where, adalora)}
    alphas = {"lora_alpha": config.get("lora_alpha"), **_pattern(config, "alpha_pattern", where, adalora)}
    for key, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MAX_RANK:
            _refuse(
                where,
                key,
                f"the rank is {printable(repr(rank), 40)}",
                f"give the weights' own, 1 to {MAX_RANK}",
            )
    for key, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) <= 1e9:
            _refuse(where, key, f"alpha is {printable(repr(alpha), 40)}", "give its real alpha, not 0")
    bias, enabled = config.get("bias"), config.get("enable_lora")
    if bias not in (None, "none", "all", "lora_only"):
        _refuse(where, "bias", f"{printable(repr(bias), 40)} is not none, all or lora_only", "correct it")
    if enabled is not None and not (
        isinstance(enabled, list)
        and len(enabled) <= MAX_PARTS
        and all(type(part) is bool for part in enabled)
    ):
        problem = f"{printable(enabled, 40)} is no list of true and false, at most {MAX_PARTS}"
        _refuse(where, "enable_lora", problem, "correct it")


def _pattern(config: Mapping[str, Any], name: str, where: str, adalora: bool) -> dict[str, Any]:
    """The values of a pattern by the key that a message shows."""
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict) or len(pattern) > MAX_NAMES:
        problem = f"expected a mapping of at most {MAX_NAMES:,} names, found {printable(config[name], 60)}"
        _refuse(where, name, problem, "save the adapter again with PEFT")
    if adalora:
        # AdaLoRA has lists there, of the ranks that it kept, and no alpha but one
        return {}
    return {f"{name} for {printable(key, 60)}": value for key, value in pattern.items()}
