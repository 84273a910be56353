"""A mixture folder, loaded on its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsmixer.adapters.importing import Pool, fill_experts
from dsmixer.adapters.mixture_folder import (
    CONFIG_FILE,
    EXPERTS_FOLDER,
    ROUTERS_FILE,
    Tensors,
    read_description,
)
from dsmixer.adapters.peft_format import read_adapter, read_safetensors
from dsmixer.config.errors import UserError
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.quantized import QUANTIZATIONS, check_packing_works, freeze_packed, loading_config


def load_mixture(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str | None = None,
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """Load a mixture on its base, ready for transformers' ``generate``.

    Args:
        folder: a mixture folder.
        base: id or path of the base model; None: the one the folder names. A relative path that is not
            found from the working directory is looked for from the folder.
        dtype: of the base; None: as in training.
        device: where the model goes; None: the CPU.
        attention: transformers' attention implementation; None: its own choice.
        quantization: ``none``, ``nf4`` or ``fp4``, of the base; None: as in training.

    Returns:
        the model, in evaluation mode, routed by its routers; and the tokenizer, or None if neither the folder
        nor the base has one.

    Raises:
        UserError: folder or base can't be read, or do not fit each other.
    """
    folder = Path(folder)
    about, config = read_description(folder)
    adapters = {name: read_adapter(folder / EXPERTS_FOLDER / name) for name in config.experts}
    routers = read_safetensors(folder / ROUTERS_FILE)
    source, revision = _base_source(folder, about, base)
    packing = _packing(about, quantization)
    model = _load_base(source, revision, dtype or about.get("dtype"), attention, packing, device)
    _check_model_type(model, about, folder)
    mixture = attach_mixers(model, config)
    fill_experts(mixture, Pool(adapters, config.rslora))
    _fill_routers(mixture, routers, folder / ROUTERS_FILE)
    tokenizer = _load_tokenizer(folder, source, revision)
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None and tokenizer is not None:
        pad = tokenizer.pad_token_id
        generation.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), tokenizer


def _base_source(folder: Path, about: Mapping[str, Any], base: str | Path | None) -> tuple[str, str | None]:
    """Where the base is, and its revision."""
    if base is not None:
        return str(base), None
    named = about.get("model")
    if not isinstance(named, str) or not named:
        problem = "it does not say which base model it belongs to"
        raise UserError(problem, where=str(folder / CONFIG_FILE), fix="give the base model's id or path")
    beside = folder / named
    if not Path(named).exists() and beside.is_dir():
        return str(beside), None
    return named, about.get("revision")


def _packing(about: Mapping[str, Any], quantization: str | None) -> tuple[str, bool] | None:
    """How the base is packed, and whether its scales are too; None: not at all."""
    kind = quantization or about.get("quantization", "none")
    if kind not in ("none", *QUANTIZATIONS):
        problem = f"unknown quantization {kind!r}"
        raise UserError(problem, fix=f"use none, {' or '.join(QUANTIZATIONS)}")
    return None if kind == "none" else (kind, bool(about.get("double_quantization", True)))


def _load_base(
    source: str,
    revision: str | None,
    dtype: Any,
    attention: str | None,
    packing: tuple[str, bool] | None,
    device: str | torch.device | None,
) -> Any:
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"unknown dtype {dtype!r}", fix="use bfloat16 or float32")
        dtype = getattr(torch, dtype)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if packing is not None:
        dtype = dtype or torch.bfloat16
        check_packing_works(packing[0], torch.device(device or "cpu"))
        options["quantization_config"] = loading_config(*packing, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype or "auto",
            device_map={"": device or "cpu"},
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the base model can't be loaded: {str(error).splitlines()[0]}",
            where=source,
            fix="give the base model's id or path (base=, or --base-model)",
        ) from error
    if packing is not None:
        freeze_packed(model, dtype)
    return model


def _check_model_type(model: nn.Module, about: Mapping[str, Any], folder: Path) -> None:
    found, wanted = getattr(model.config, "model_type", None), about.get("model_type")
    if wanted is not None and found != wanted:
        problem = f"the base is a {found} model, and the mixture was made on a {wanted}"
        raise UserError(problem, where=str(folder / CONFIG_FILE), fix="give the mixture's own base")


@torch.no_grad()
def _fill_routers(mixture: Mixture, tensors: Tensors, path: Path) -> None:
    wanted = {f"{owner}.weight": router for owner, router in mixture.routers.items()}
    if set(wanted) != set(tensors):
        odd = sorted(set(wanted) ^ set(tensors))[:3]
        problem = f"its routers are not those of {CONFIG_FILE}: {', '.join(odd)}"
        raise UserError(problem, where=str(path), fix="copy the whole mixture again")
    for key, router in wanted.items():
        if tensors[key].shape != router.weight.shape:
            problem = f"{key} is {list(tensors[key].shape)}, expected {list(router.weight.shape)}"
            raise UserError(problem, where=str(path), fix="use the base model that the mixture was made on")
        router.weight.copy_(tensors[key])


def _load_tokenizer(folder: Path, source: str, revision: str | None) -> Any:
    if (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if Path(source).is_dir() and not any(Path(source).glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        problem = f"the tokenizer can't be loaded: {str(error).splitlines()[0]}"
        raise UserError(problem, where=source, fix="save the mixture with its tokenizer") from error
