"""PEFT LoRA folders: writing an expert as one, and reading one whole or not at all.

What is written is ``adapter_config.json`` and ``adapter_model.safetensors`` with, for each projection,
``base_model.model.PATH.lora_A.weight`` ``[R, D]`` and ``base_model.model.PATH.lora_B.weight`` ``[O, R]``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from dsmixer.adapters.lora_config import CONFIG_FILE, is_adalora, read_adapter_config
from dsmixer.adapters.low_rank_forms import KEY_PREFIX, LoraPair, pairs_of
from dsmixer.adapters.memory import enough_memory
from dsmixer.adapters.untrusted import shown
from dsmixer.adapters.weight_files import SAFETENSORS, read_safetensors, read_weights
from dsmixer.config.errors import UserError

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "LoraAdapter",
    "LoraPair",
    "check_savable",
    "read_adapter",
    "read_adapter_config",
    "read_safetensors",
    "write_adapter",
]

WEIGHTS_FILE = SAFETENSORS


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter that is a sum of low rank, checked.

    Attributes:
        folder: where it was read from.
        config: its ``adapter_config.json``.
        pairs: its weights by module path in the base model.
        verbatim: whether PEFT reads the folder as it lies there; not pickles, and not the forms of old.
    """

    folder: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, LoraPair]
    verbatim: bool = False

    @property
    def rank(self) -> int:
        """The largest rank among its projections."""
        return max(pair.rank for pair in self.pairs.values())


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
    """Read the folder of an adapter that is a sum of low rank: LoRA or AdaLoRA as PEFT saved it, now or ever.

    Raises:
        UserError: it is not there, is anything else, is damaged, or its configuration and weights disagree.
            The message names the file, what is wrong and what to do.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    path, tensors = read_weights(folder, empty=is_adalora(config))
    with enough_memory(shown(path)):
        pairs = pairs_of(config, tensors, shown(folder / CONFIG_FILE), shown(path))
    plain = not is_adalora(config) and not config.get("enable_lora") and path.name == SAFETENSORS
    keys = {f"{KEY_PREFIX}{own}.lora_{part}.weight" for own in pairs for part in "AB"}
    return LoraAdapter(folder, config, pairs, verbatim=plain and keys == set(tensors))
