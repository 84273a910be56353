"""A mixture folder, loaded on its base."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from dsmixer.adapters.importing import BaseMismatchWarning, fill_experts
from dsmixer.adapters.mixture_folder import CONFIG_FILE
from dsmixer.adapters.saved_mixture import check_base, fill_routers, read_mixture
from dsmixer.adapters.sources import another_base
from dsmixer.config.errors import UserError
from dsmixer.model.inject import attach_mixers
from dsmixer.model.load import model_class
from dsmixer.model.quantized import QUANTIZATIONS, check_packing_works, freeze_packed, loading_config


def load_mixture(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str | None = None,
    quantization: str | None = None,
    transfer: bool = False,
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
        transfer: whether ``base`` may be another kind of model than the mixture was made on, with modules of
            the same names and widths (arXiv 2507.00029, Table 5).

    Returns:
        the model, in evaluation mode, routed by its routers; and the tokenizer, or None if neither the folder
        nor the base has one.

    Raises:
        UserError: folder or base can't be read, or do not fit each other; in a transfer the projections that
            do not match are listed.
    """
    folder = Path(folder)
    saved = read_mixture(folder)
    about = saved.about
    source, revision = _base_source(folder, about, base)
    packing = _packing(about, quantization)
    if not transfer and another_base(about.get("model"), str(base) if base is not None else None):
        text = f"the mixture was made on {about['model']}, and {base} is taken with the mixture's tokenizer"
        told = f"{text}; transfer=True takes the tokenizer of the base"
        warnings.warn(told, BaseMismatchWarning, stacklevel=2)
    model = _load_base(source, revision, dtype or about.get("dtype"), attention, packing, device)
    check_base(saved, model, transfer=transfer)
    mixture = attach_mixers(model, saved.config)
    fill_experts(mixture, saved.pool)
    fill_routers(mixture, saved)
    # another base has other tokens
    tokenizer = _load_tokenizer(None if transfer else folder, source, revision)
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
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = model_class(config).from_pretrained(
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


def _load_tokenizer(folder: Path | None, source: str, revision: str | None) -> Any:
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if Path(source).is_dir() and not any(Path(source).glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        problem = f"the tokenizer can't be loaded: {str(error).splitlines()[0]}"
        raise UserError(problem, where=source, fix="save the mixture with its tokenizer") from error
