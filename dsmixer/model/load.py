"""The frozen base model and its tokenizer, from a folder or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig

from dsmixer.config.errors import UserError
from dsmixer.config.schema import BaseConfig
from dsmixer.model.quantized import check_stored_form, freeze_packed, loading_config
from dsmixer.model.streams import ENCODER_DECODERS, decoder_start, is_encoder_decoder
from dsmixer.model.targets import PACKABLE
from dsmixer.placement.groups import cut_weights

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
UNWANTED_FILES = ["*/*", "consolidated*"]
"""Other formats of the same weights, which some repositories hold beside those that transformers reads."""
STATE_SPACE = ("mamba", "falcon_mamba", "mamba2")
"""Recurrent kinds that are trained here: their layers carry a state from each token to the next."""
OTHER_RECURRENT = ("rwkv", "jamba", "bamba", "recurrent_gemma")


@dataclass
class LoadedBase:
    """A base model as loaded.

    Attributes:
        model: the language model, a decoder or an encoder with one.
        tokenizer: its tokenizer.
        zero3_config: what told transformers to load it in shards; alive as long as the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    zero3_config: HfDeepSpeedConfig | None


def load_base(
    base: BaseConfig,
    *,
    packing: bool = False,
    zero3: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> LoadedBase:
    """Load model and tokenizer, never running code that comes with them.

    Under ZeRO-3 each rank keeps only its part of every weight: in 16 or 32 bits it never has more than that
    and one whole weight; in 4 bits, which transformers does not shard as it loads, it has the whole packed
    base for a moment. Nowhere does a base in 4 bits stand unpacked but for one weight at a time.

    Args:
        base: the recipe's section.
        packing: whether rows will hold several examples, which the model must be able to keep apart.
        zero3: the ``zero_optimization`` block of the engine to come, if that is of stage 3.
        device: where the model goes; None: the CPU. Under ZeRO-3 the rank's own device.

    Raises:
        UserError: the model is not there, of a kind that can't be trained here, or has no tokenizer.
    """
    config = read_config(base)
    _check_kind(config, base)
    _check_packing(config, packing)
    tokenizer = load_tokenizer(base.model, base.revision)
    device, dtype = device or torch.device("cpu"), DTYPES[base.dtype]
    four_bit = base.quantization != "none"
    shard = zero3 is not None and not four_bit
    zero3_config = _sharded_loading(base, zero3) if zero3 is not None and shard else None
    options: dict[str, Any] = {"revision": base.revision, "trust_remote_code": False}
    if base.attention != "auto":
        options["attn_implementation"] = base.attention
    if not shard:
        # straight to its device, weight by weight; a packed weight must not be moved afterwards
        options |= {"dtype": dtype, "device_map": {"": device}}
    if four_bit and getattr(config, "quantization_config", None) is None:
        options["quantization_config"] = loading_config(base.quantization, base.double_quantization, dtype)
    try:
        model = model_class(config).from_pretrained(base.model, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _unloadable(base, error) from error
    if four_bit:
        freeze_packed(model, dtype)
    _check_dtypes(model, dtype)
    if four_bit and zero3 is not None:
        cut_weights(model, _sharded_config(base, zero3))
    if base.activation_checkpointing:
        checkpoint_activations(model)
    return LoadedBase(model, tokenizer, zero3_config)


def fetch_base(base: BaseConfig) -> None:
    """Bring a base of the hub, with its tokenizer, into the cache of this machine; nothing for a folder.

    Raises:
        UserError: it can't be had.
    """
    if Path(base.model).is_dir() or base.model.startswith((".", "/", "~")):
        return
    try:
        snapshot_download(
            base.model, revision=base.revision, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model could not be downloaded: {_one_line(error)}",
            where=f"base.model: {base.model}",
            fix=_FIX,
        ) from error


_FIX = "give a transformers folder (config.json and safetensors) or a hub id, and check base.revision"


def bare_base(base: BaseConfig, *, packing: bool = False) -> PreTrainedModel:
    """The base's modules without weights (on the meta device): what can be checked before minutes of loading.

    Raises:
        UserError: as :func:`load_base`, but for weights and tokenizer.
    """
    config = read_config(base)
    _check_kind(config, base)
    _check_packing(config, packing)
    options = {} if base.attention == "auto" else {"attn_implementation": base.attention}
    try:
        with torch.device("meta"):
            model = model_class(config).from_config(config, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        raise _unloadable(base, error) from error
    return model


def _unloadable(base: BaseConfig, error: Exception) -> UserError:
    problem = f"the model could not be loaded: {_one_line(error)}"
    return UserError(problem, where=f"base.model: {base.model}", fix=_FIX)


def _one_line(error: Exception) -> str:
    """The reason a library gives, which may run over many lines, cut to what can be read."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id."""
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer could be loaded: {_one_line(error)}",
            where=f"base.model: {source}",
            fix="put the tokenizer's files beside the model's",
        ) from error


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Run each layer again in the backward pass instead of keeping its activations.

    Without re-entrance, so that losses taken inside a layer keep their graph. The check of recomputed
    metadata is off, because ZeRO-3 shows it released (empty) weights where it had seen gathered ones.
    """
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "determinism_check": "none"}
    )


def model_class(config: Any) -> Any:
    """What of transformers loads a base of this configuration with its language-model head."""
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def read_config(base: BaseConfig) -> Any:
    """The configuration of a base.

    Raises:
        UserError: there is none.
    """
    if base.model.startswith((".", "/", "~")) and not Path(base.model).is_dir():
        raise UserError("no such folder", where=f"base.model: {base.model}", fix=_FIX)
    try:
        return AutoConfig.from_pretrained(base.model, revision=base.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no model configuration could be read: {_one_line(error)}",
            where=f"base.model: {base.model}",
            fix=_FIX,
        ) from error


def _check_kind(config: Any, base: BaseConfig) -> None:
    kind = str(getattr(config, "model_type", ""))
    where = f"base.model: {base.model}"
    if is_encoder_decoder(config) and kind not in ENCODER_DECODERS:
        raise UserError(
            f"{kind} is an encoder-decoder model of a kind that was never tried here",
            where=where,
            fix=f"choose one of {', '.join(sorted(ENCODER_DECODERS))}, or a causal language model",
        )
    try:
        decoder_start(config)
    except UserError as error:
        raise UserError(f"{error.where}: {error.problem}", where=where, fix=error.fix) from error
    if kind in OTHER_RECURRENT:
        raise UserError(
            f"{kind} has recurrent layers of a kind that was never tried here",
            where=where,
            fix=f"choose one of {', '.join(STATE_SPACE)}, or a causal language model with attention",
        )
    check_stored_form(config, base)


def _sharded_loading(base: BaseConfig, zero3: Mapping[str, Any]) -> HfDeepSpeedConfig:
    return HfDeepSpeedConfig(_sharded_config(base, zero3))


def _sharded_config(base: BaseConfig, zero3: Mapping[str, Any]) -> dict[str, Any]:
    """What cuts the base: not the engine's own configuration, for the base has types of its own."""
    # the frozen base is cut once, here: where its parts live must be known already
    offload = {key: zero3[key] for key in ("offload_param",) if key in zero3}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **offload},
        # transformers hands zero.Init no dtype: it takes bf16 from here, and float32 without it
        "bf16": {"enabled": base.dtype == "bfloat16"},
    }


def _check_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    wrong = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != dtype}
    assert not wrong, f"the base was loaded as {', '.join(sorted(wrong))}, not {dtype}"


def _check_packing(config: Any, packing: bool) -> None:
    kind = str(getattr(config, "model_type", ""))
    if packing and is_encoder_decoder(config):
        raise UserError(
            f"{kind} has an encoder, in which the examples of one row would see each other",
            where="data.packing",
            fix="write data.packing: false",
        )
    if packing and kind in STATE_SPACE:
        raise UserError(
            f"{kind} carries its state from one example of a row into the next",
            where="data.packing",
            fix="write data.packing: false",
        )
    if packing and kind not in PACKABLE:
        raise UserError(
            f"the architecture {kind} is not known to keep the examples of one row apart",
            where="data.packing",
            fix="write data.packing: false",
        )
