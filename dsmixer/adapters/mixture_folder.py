"""The mixture folder: what it holds, and saving a mixture as one.

mixer_config.json        what was attached, and to which base
routers.safetensors      one matrix a router, ``PATH.weight``, PATH the projection that owns it
experts/NAME/            each a plain PEFT LoRA adapter
adapter_config.json      by which PEFT opens the whole folder, with an adapter_model.safetensors that is empty
README.md                the model card, and pictures it shows
tokenizer files          where a tokenizer was given
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dsmixer import __version__
from dsmixer.adapters.card import facts_of_mixers, model_card
from dsmixer.adapters.importing import check_expert_name
from dsmixer.adapters.module_names import base_module_names, shortest_names
from dsmixer.adapters.outside_peft import not_applied_by_peft
from dsmixer.adapters.peft_format import check_savable, write_adapter
from dsmixer.adapters.peft_method import is_saved_by_peft, read_saved_by_peft, write_for_peft
from dsmixer.adapters.publish import published
from dsmixer.config.errors import UserError
from dsmixer.model.inject import Mixture
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.quantized import quantization_of

CONFIG_FILE = "mixer_config.json"
ROUTERS_FILE = "routers.safetensors"
EXPERTS_FOLDER = "experts"
CARD_FILE = "README.md"
FORMAT_VERSION = 1

Tensors = Mapping[str, torch.Tensor]


def is_mixture_folder(folder: str | Path) -> bool:
    """Whether the folder says that it is a mixture."""
    return (Path(folder) / CONFIG_FILE).is_file()


def save_mixture(
    mixture: Mixture,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: str | None = None,
    revision: str | None = None,
    state: Tensors | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a mixture folder; one process alone calls this.

    Args:
        mixture: what ``attach_mixers`` gave.
        folder: appears whole or not at all; a mixture that is there already is replaced, nothing else is.
        tokenizer: saved along.
        base: id or path of the base model; None: the one it was loaded from.
        revision: of the base model on the hub.
        state: full tensors by parameter name, as ``Mixture.expert_parameters`` and ``router_parameters``
            name them, where the live parameters are partitioned; None: the live ones.
        facts: more for the model card, see ``card.model_card``; its ``pictures`` are the bytes of PNG files
            by name, which are put beside the card.

    Raises:
        UserError: the folder is something else, the disk refuses, or a weight is empty, not finite or no
            longer float32.
    """
    folder = Path(folder)
    for name in mixture.expert_names:
        check_expert_name(name)
    parameters = [*mixture.expert_parameters(), *mixture.router_parameters()]
    if state is None:
        _check_whole(parameters)
    full = {name: (parameter if state is None else state[name]).detach() for name, parameter in parameters}
    for name, tensor in full.items():
        check_savable(name, tensor)
    base = base or getattr(getattr(mixture.model, "config", None), "_name_or_path", None) or None
    description = _description(mixture, base, revision)
    facts = dict(facts or {})
    pictures: Mapping[str, bytes] = facts.pop("pictures", {})
    with published(folder, may_replace=is_mixture_folder) as part:
        for index in range(len(mixture.expert_names)):
            _write_expert(part, mixture, full, index, base, revision)
        routers = {
            f"{path}.weight": full[f"{path}.router.weight"].to("cpu", torch.float32).contiguous()
            for path in mixture.routers
        }
        save_file(routers, part / ROUTERS_FILE, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        for name, picture in pictures.items():
            (part / name).write_bytes(picture)
        card = {**_card_facts(mixture, description, facts), "pictures": list(pictures)}
        (part / CARD_FILE).write_text(model_card(card), encoding="utf-8")
        write_description(part, description, task_type(mixture.model))
    return folder


def _check_whole(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in parameters:
        if tensor.dtype in (torch.bfloat16, torch.float16):
            problem = f"the weight is {str(tensor.dtype).removeprefix('torch.')}: its float32 digits are gone"
            fix = "load the mixture again, and save it before ready_to_serve"
            raise UserError(problem, where=name, fix=fix)


def write_description(folder: Path, description: Mapping[str, Any], task: str) -> None:
    """Say what a mixture folder holds, to dsmixer and to PEFT.

    Args:
        folder: being written.
        description: ``{"format_version", "dsmixer_version", "base", "mixer"}``.
        task: PEFT's task type.
    """
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    write_for_peft(folder, description, task)


def task_type(model: Any) -> str:
    """PEFT's task type of a language model."""
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"


def _description(mixture: Mixture, base: str | None, revision: str | None) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "dsmixer_version": __version__,
        "base": {"model": base, "revision": revision, **form_of_base(mixture)},
        "mixer": mixture.config.to_dict(),
    }


def form_of_base(mixture: Mixture) -> dict[str, Any]:
    """The kind of the model under a mixture, and how its weights are held.

    Returns:
        ``model_type``, ``dtype``, ``quantization`` and, in 4 bits, ``double_quantization``.
    """
    mixer = next(iter(mixture.mixers.values()))
    # a weight that others have packed is stored as integers; its products run in bfloat16
    dtypes = (p.dtype for p in mixer.base.parameters() if p.is_floating_point())
    dtype = next(dtypes, torch.bfloat16)
    kind, double = quantization_of(mixture.model) or ("none", False)
    return {
        "model_type": getattr(getattr(mixture.model, "config", None), "model_type", None),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": kind,
        **({"double_quantization": double} if kind != "none" else {}),
    }


def _card_facts(
    mixture: Mixture, description: Mapping[str, Any], facts: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "base": description["base"]["model"],
        **facts_of_mixers(mixture.config),
        "task_type": task_type(mixture.model),
        "not_applied": not_applied_by_peft(description["base"]["model_type"], mixture.mixers),
        **(facts or {}),
    }


def _write_expert(
    part: Path, mixture: Mixture, full: Tensors, index: int, base: str | None, revision: str | None
) -> None:
    rank = mixture.config.rank_list[index]
    matrices = {
        path: (
            full[f"{path}.bank.lora_A"][index, :rank],
            full[f"{path}.bank.lora_B"][index, :rank].T,
        )
        for path in mixture.mixers
    }
    # where an imported adapter had nothing, both are zero, and its folder has nothing there either
    held = {path: pair for path, pair in matrices.items() if any(bool(matrix.any()) for matrix in pair)}
    matrices = held or matrices
    write_adapter(
        part / EXPERTS_FOLDER / mixture.expert_names[index],
        matrices,
        rank=rank,
        alpha=mixture.config.alpha_list[index],
        targets=shortest_names(matrices.keys(), base_module_names(mixture.model)),
        rslora=mixture.config.rslora,
        dropout=mixture.config.dropout,
        fan_in_fan_out=all(stored_transposed(mixture.mixers[path].base) for path in matrices),
        base=base,
        revision=revision,
        task_type=task_type(mixture.model),
    )


def stored_transposed(base: torch.nn.Module) -> bool:
    """Whether a projection keeps its weight as ``[D, O]``, which PEFT calls ``fan_in_fan_out``."""
    # a packed layer has forgotten, but for this, that it lay the other way round
    return issubclass(getattr(base, "source_cls", type(base)), Conv1D)


def read_description(folder: str | Path) -> tuple[dict[str, Any], MixerConfig]:
    """The folder's ``mixer_config.json``: what it says of the base, and the mixers.

    Of a mixture that PEFT has saved, ``adapter_config.json``.

    Raises:
        UserError: the folder is no mixture, is of a later format, or names what can't be.
    """
    folder, path = Path(folder), Path(folder) / CONFIG_FILE
    if not path.is_file() and is_saved_by_peft(folder):
        found = read_saved_by_peft(folder)
        _check_names(found[1])
        return found
    if not path.is_file():
        problem = f"the folder has no {CONFIG_FILE}" if folder.is_dir() else "no such folder"
        raise UserError(problem, where=str(folder), fix="give the folder of a mixture, runs/NAME/mixture")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version, base, mixer = values["format_version"], values["base"], values["mixer"]
        config = MixerConfig.from_dict(mixer)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is no description of a mixture ({type(error).__name__}: {error})"
        raise UserError(problem, where=str(path), fix="copy or save the mixture again") from error
    if version != FORMAT_VERSION:
        problem = f"format {version!r}, and this dsmixer reads {FORMAT_VERSION}"
        raise UserError(
            problem, where=str(path), fix="use the version of dsmixer that wrote it, or a later one"
        )
    _check_names(config)
    return dict(base), config


def _check_names(config: MixerConfig) -> None:
    for name in config.experts:
        check_expert_name(name)
