"""A mixture as PEFT sees one: what a mixture folder holds for it, and the folder that PEFT itself saves.

PEFT asks a folder for ``adapter_config.json`` and ``adapter_model.safetensors``. In a mixture folder the
second is empty, and the first says so: routers and experts stay where they are. What PEFT saves has all
weights in it, by their names in the model, each bank whole:

base_model.model.PATH.bank.lora_A       [E, R, D], R padded
base_model.model.PATH.bank.lora_B       [E, R, O]
base_model.model.PATH.router.weight     [E, D], where the projection owns a router
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsmixer.adapters.card import USE, model_card, usage
from dsmixer.adapters.peft_format import (
    CONFIG_FILE,
    KEY_PREFIX,
    WEIGHTS_FILE,
    LoraAdapter,
    LoraPair,
    read_safetensors,
)
from dsmixer.config.errors import UserError
from dsmixer.experts.bank import lora_scaling
from dsmixer.model.inject import Mixture
from dsmixer.model.mixer_config import MixerConfig

PEFT_TYPE = "DSMIXER"
IN_FILE, IN_FOLDERS = "adapter_model", "experts"
"""Where the weights are, as ``weights_in`` says: all in one file, or in the folders of the experts."""

ROUTER = ".router.weight"

CARD_FILE = "README.md"
BLANK, OURS = "[More Information Needed]", "Made with dsmixer"
"""What the cards say that PEFT makes, and ours."""
PICTURE = re.compile(r"\]\(([\w.-]+\.png)\)")

OF_PEFT = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
OF_TRAINING = ("inference_mode", "weights_in", "train", "rsl")
OF_BASE = ("model_type", "dtype", "quantization", "double_quantization")
"""Keys of ``adapter_config.json`` that say nothing about the mixture itself."""


def write_for_peft(folder: Path, description: Mapping[str, Any], task_type: str) -> None:
    """Make PEFT open a mixture folder, without a weight twice.

    Args:
        folder: being written.
        description: of the mixture, as ``mixer_config.json`` holds it.
        task_type: PEFT's, such as ``CAUSAL_LM``.
    """
    values = {
        "peft_type": PEFT_TYPE,
        "task_type": task_type,
        "base_model_name_or_path": description["base"]["model"],
        "revision": description["base"]["revision"],
        "inference_mode": True,
        "weights_in": IN_FOLDERS,
        **{key: description["base"][key] for key in OF_BASE if key in description["base"]},
        **description["mixer"],
    }
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    save_file({}, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def is_saved_by_peft(folder: str | Path) -> bool:
    """Whether PEFT has saved a mixture there."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return False
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(values, dict)
        and values.get("peft_type") == PEFT_TYPE
        and values.get("weights_in", IN_FILE) == IN_FILE
    )


def read_saved_by_peft(folder: Path) -> tuple[dict[str, Any], MixerConfig]:
    """What such a folder says of its base, and the mixers; as ``read_description``."""
    path = folder / CONFIG_FILE
    values = json.loads(path.read_text(encoding="utf-8"))
    base = {"model": values.get("base_model_name_or_path"), "revision": values.get("revision")}
    base |= {key: values[key] for key in OF_BASE if values.get(key) is not None}
    mixer = {key: value for key, value in values.items() if key not in (*OF_PEFT, *OF_TRAINING, *OF_BASE)}
    try:
        return base, MixerConfig.from_dict(mixer)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"is no description of a mixture ({type(error).__name__}: {error})"
        raise UserError(problem, where=str(path), fix="save the mixture again") from error


def read_weights_of_peft(
    folder: Path, config: MixerConfig
) -> tuple[dict[str, LoraAdapter], dict[str, torch.Tensor]]:
    """The experts by name, and the routers by the path of their owner, of a mixture that PEFT has saved.

    Raises:
        UserError: a weight can't be read, has no counterpart, or is not of the configuration's sizes.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"the folder has no {WEIGHTS_FILE}", where=str(folder), fix="save the mixture again")
    routers: dict[str, torch.Tensor] = {}
    banks: dict[str, dict[str, torch.Tensor]] = {"lora_A": {}, "lora_B": {}}
    for name, tensor in without_prefix(read_safetensors(path)).items():
        owner, dot, kind = name.rpartition(".bank.")
        if dot and kind in banks:
            banks[kind][owner] = tensor
        elif name.endswith(ROUTER):
            routers[name.removesuffix(ROUTER)] = tensor
        else:
            fix = "save the mixture again, with PEFT's save_pretrained"
            raise UserError(f"{name!r} is no part of a mixture", where=str(path), fix=fix)
    shapes_fit = set(banks["lora_A"]) == set(banks["lora_B"]) and all(
        tensor.dim() == 3 and len(tensor) == len(config.experts) and tensor.shape[1] >= max(config.rank_list)
        for bank in banks.values()
        for tensor in bank.values()
    )
    if not banks["lora_A"] or not shapes_fit:
        problem = f"its banks are not of the {len(config.experts)} experts that {CONFIG_FILE} names"
        raise UserError(problem, where=str(path), fix="bring the weights and the configuration together")
    adapters = {name: _adapter(folder, config, banks, e) for e, name in enumerate(config.experts)}
    return adapters, routers


def _adapter(
    folder: Path, config: MixerConfig, banks: Mapping[str, Mapping[str, torch.Tensor]], index: int
) -> LoraAdapter:
    rank, alpha = config.rank_list[index], config.alpha_list[index]
    scaling = lora_scaling(rank, alpha, config.rslora)
    pairs = {
        path: LoraPair(a_ERD[index, :rank], banks["lora_B"][path][index, :rank].T, scaling)
        for path, a_ERD in banks["lora_A"].items()
    }
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": config.rslora}
    return LoraAdapter(folder, {**plain, "target_modules": sorted(pairs)}, pairs)


def check_saved(mixture: Mixture, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights that are not the mixture's, one to one.

    Args:
        tensors: by name in the model.

    Raises:
        UserError: a weight is missing, strange, of another shape or not finite.
    """
    wanted = dict([*mixture.expert_parameters(), *mixture.router_parameters()])
    fix = "use the base model that the mixture was made on, and the whole folder"
    if set(wanted) != set(tensors):
        odd = sorted(set(wanted) ^ set(tensors))[:3]
        raise UserError(
            f"its weights are not those of its configuration: {', '.join(odd)}", where=where, fix=fix
        )
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            problem = f"{name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}"
            raise UserError(problem, where=where, fix=fix)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise UserError(f"{name} holds NaN or infinity", where=where, fix="save an earlier checkpoint")


def write_card(folder: Path, facts: Mapping[str, Any], loaded_from: Path | None) -> None:
    """Put the mixture's card in the place of the one that PEFT has begun; a card of the user's own stays.

    Args:
        folder: that PEFT has saved.
        facts: as ``card.model_card`` takes them.
        loaded_from: the folder that the weights are from: what its card says holds for them. None: they were
            trained since.
    """
    path, source = folder / CARD_FILE, None if loaded_from is None else loaded_from / CARD_FILE
    if not path.is_file() or not any(sign in path.read_text(encoding="utf-8") for sign in (BLANK, OURS)):
        return
    facts = {**facts, "in_folders": False}
    text = model_card(facts)
    before = source.read_text(encoding="utf-8") if source is not None and source.is_file() else ""
    if OURS in before and USE in before:
        text = f"{before.partition(USE)[0]}{USE}\n\n{usage(facts)}"
        for picture in set(PICTURE.findall(text)):
            if source is not None and (source.parent / picture).is_file() and source.parent != folder:
                shutil.copyfile(source.parent / picture, folder / picture)
    path.write_text(text, encoding="utf-8")


def check_file(folder: Path) -> None:
    """Refuse a folder of PEFT's without its weights, or with a file of them that is cut.

    Raises:
        UserError: names the folder.
    """
    path, fix = folder / WEIGHTS_FILE, "copy the whole folder again"
    if not path.is_file():
        raise UserError(f"the folder has no {WEIGHTS_FILE}", where=str(folder), fix=fix)
    try:
        # the header is held against the file's size, and no weight is read
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't be read: {error}", where=str(path), fix=fix) from error


def without_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name in the model, from a file that PEFT wrote."""
    return {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}
