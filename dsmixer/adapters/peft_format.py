"""PEFT LoRA folders: writing an expert as one, and reading one whole or not at all.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with, for each projection,
``base_model.model.PATH.lora_A.weight`` ``[R, D]`` and ``base_model.model.PATH.lora_B.weight`` ``[O, R]``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsmixer.config.errors import UserError
from dsmixer.experts.bank import lora_scaling

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])\.weight$")

# what plain LoRA is made of, and what says nothing about the weights' meaning
PLAIN_KEYS = frozenset(
    ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
    + ("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora")
    + ("fan_in_fan_out", "bias", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern")
    + ("alpha_pattern", "megatron_core", "qalora_group_size", "merge_weights", "ensure_weight_tying")
    + ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
)
REASONS = {
    "use_dora": "it is DoRA, whose magnitude vectors a mixture has no place for",
    "lora_bias": "its lora_B has a bias",
    "modules_to_save": "it replaces whole modules of the base",
    "trainable_token_indices": "it changes token embeddings",
    "target_parameters": "it adapts bare parameters, not projections",
    "layer_replication": "it changes the number of the base's layers",
    "enable_lora": "it is of PEFT's first form for fused projections, which PEFT itself no longer reads",
}
# starts that leave the base's weights as they are; the others subtract from them (PiSSA, OLoRA, LoftQ, ...)
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraPair:
    """One expert on one projection.

    Attributes:
        a_RD: PEFT's ``lora_A`` weight, float32.
        b_OR: PEFT's ``lora_B`` weight, float32.
        scaling: ``s``, what ``B A x`` is multiplied with.
    """

    a_RD: torch.Tensor
    b_OR: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class LoraAdapter:
    """A plain LoRA adapter, checked.

    Attributes:
        folder: where it was read from.
        config: its ``adapter_config.json``.
        pairs: its weights by module path in the base model.
    """

    folder: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, LoraPair]

    @property
    def rank(self) -> int:
        """The largest rank among its projections."""
        return max(pair.a_RD.shape[0] for pair in self.pairs.values())


def write_adapter(
    folder: Path,
    matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    rank: int,
    alpha: float,
    targets: list[str],
    rslora: bool = False,
    dropout: float = 0.0,
    fan_in_fan_out: bool = False,
    base: str | None = None,
    revision: str | None = None,
    task_type: str = "CAUSAL_LM",
) -> None:
    """Write one expert as a PEFT LoRA folder.

    Args:
        folder: made here; must not exist.
        matrices: by module path, ``lora_A [R, D]`` and ``lora_B [O, R]``.
        rank: R.
        alpha: PEFT's ``lora_alpha``.
        targets: names that PEFT matches against module paths.
        fan_in_fan_out: whether the projections are ``Conv1D``, which store ``[D, O]``.
        base: name or path of the base model; for the reader only.

    Raises:
        UserError: a matrix is empty, misshapen or not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path, (a_RD, b_OR) in matrices.items():
        for factor, matrix, side in (("A", a_RD, 0), ("B", b_OR, 1)):
            key = f"{KEY_PREFIX}{path}.lora_{factor}.weight"
            check_savable(key, matrix)
            assert matrix.dim() == 2 and matrix.shape[side] == rank, (key, tuple(matrix.shape), rank)
            tensors[key] = matrix.detach().to("cpu", torch.float32).contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        target_modules=sorted(targets),
        lora_dropout=dropout,
        use_rslora=rslora,
        fan_in_fan_out=fan_in_fan_out,
        task_type=task_type,
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_savable(name: str, tensor: torch.Tensor) -> None:
    """Refuse to save what could only be a broken expert.

    Raises:
        UserError: the tensor is empty, as partitioned parameters are, or holds NaN or infinity.
    """
    if tensor.numel() == 0:
        raise UserError(
            "the weight is empty: it is partitioned by ZeRO-3 or was never filled",
            where=name,
            fix="gather the full weights and give them as state=",
        )
    if not torch.isfinite(tensor).all():
        raise UserError("the weight holds NaN or infinity", where=name, fix="save an earlier checkpoint")


def read_adapter(folder: str | Path) -> LoraAdapter:
    """Read a PEFT LoRA folder.

    Raises:
        UserError: it is not there, not plain LoRA, damaged, or its configuration and weights disagree.
            The message names the file, what is wrong and what to do.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    tensors = _read_tensors(folder)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.match(key)
        if match is None:
            raise UserError(
                f"the weight {key!r} is no lora_A or lora_B of a projection",
                where=str(folder / WEIGHTS_FILE),
                fix="use a plain LoRA adapter on linear layers, as PEFT's save_pretrained writes it",
            )
        factors.setdefault(match["path"], {})[match["factor"]] = tensor
    pairs = {path: _pair(folder, config, path, found) for path, found in factors.items()}
    if not pairs:
        raise UserError("the file holds no weights", where=str(folder / WEIGHTS_FILE), fix="save it again")
    return LoraAdapter(folder, config, pairs)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The folder's ``adapter_config.json``, refused unless it describes plain LoRA."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{'no such folder' if not folder.is_dir() else f'the folder has no {CONFIG_FILE}'}",
            where=str(folder),
            fix="give the folder of a PEFT LoRA adapter",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot be read as JSON: {error}", where=str(path), fix="save it again") from error
    if not isinstance(config, dict):
        raise UserError("is no JSON object", where=str(path), fix="save the adapter again with PEFT")
    _refuse_other_than_plain(config, path)
    return config


def _refuse_other_than_plain(config: Mapping[str, Any], path: Path) -> None:
    def refuse(key: str, problem: str, fix: str = "train or convert it to plain LoRA first") -> None:
        raise UserError(problem, where=f"{path}: {key}", fix=fix)

    kind = config.get("peft_type")
    if kind != "LORA":
        refuse("peft_type", f"the adapter is {kind!r}, and only LORA can be an expert")
    if config.get("bias", "none") not in ("none", None):
        refuse("bias", f"the adapter trains biases of the base ({config['bias']!r})")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        start = config["init_lora_weights"]
        refuse("init_lora_weights", f"{start!r} changed the base's weights, and an expert must not")
    for key, value in config.items():
        if value and key not in PLAIN_KEYS:
            refuse(key, f"the adapter is not plain LoRA: {REASONS.get(key, f'it uses {key}')}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
        refuse("r", f"the rank is {rank!r}", "give the rank of the weights")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        refuse("lora_alpha", f"alpha is {alpha!r}", "give a number")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            refuse(key, f"expected a mapping, found {config[key]!r}", "save the adapter again with PEFT")


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("adapter_model.*"))
        held = f"only {', '.join(pickles)}, a pickle" if pickles else "no weights"
        raise UserError(
            f"the folder has {held}, not {WEIGHTS_FILE}",
            where=str(folder),
            fix="load it in PEFT and save it again: save_pretrained writes safetensors",
        )
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file as float32 on the CPU.

    Raises:
        UserError: the file is damaged, or a tensor is empty, not of floating point, or not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the file is damaged or cut short ({error})", where=str(path), fix="copy or save it again"
        ) from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{key} is {tensor.dtype}", where=str(path), fix="save it in floating point")
        if tensor.numel() == 0:
            raise UserError(f"{key} is empty", where=str(path), fix="save it again with gathered weights")
        tensors[key] = tensor.to(torch.float32)
        if not torch.isfinite(tensors[key]).all():
            raise UserError(f"{key} holds NaN or infinity", where=str(path), fix="use a sound adapter")
    return tensors


def _pair(folder: Path, config: Mapping[str, Any], path: str, found: Mapping[str, torch.Tensor]) -> LoraPair:
    where = str(folder / WEIGHTS_FILE)
    for factor in ("A", "B"):
        if factor not in found:
            raise UserError(f"{path} has no lora_{factor}", where=where, fix="save the adapter again")
    a_RD, b_OR = found["A"], found["B"]
    rank = _patterned(config, "rank_pattern", path, config["r"])
    alpha = _patterned(config, "alpha_pattern", path, config["lora_alpha"])
    if a_RD.dim() != 2 or b_OR.dim() != 2 or not a_RD.shape[0] == b_OR.shape[1] == rank:
        raise UserError(
            f"{path}: lora_A {list(a_RD.shape)} and lora_B {list(b_OR.shape)} are not of rank {rank}, "
            f"which {CONFIG_FILE} gives",
            where=where,
            fix="bring the weights and the configuration of one adapter together",
        )
    return LoraPair(a_RD, b_OR, lora_scaling(rank, alpha, bool(config.get("use_rslora"))))


def _patterned(config: Mapping[str, Any], name: str, path: str, default: Any) -> Any:
    """The value of a projection: PEFT's ``rank_pattern`` and ``alpha_pattern`` override by name."""
    pattern = config.get(name) or {}
    try:
        value = pattern.get(get_pattern_key(list(pattern), path), default)
    except re.error as error:
        raise UserError(f"{name} holds a broken pattern: {error}", where=CONFIG_FILE) from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} gives {value!r} for {path}", where=CONFIG_FILE, fix="give a number")
    return value
