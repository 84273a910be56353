"""A mixture folder that is about to be written from another: values to change, and the writing of them.

No base model is loaded, and the files of experts are copied as they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsmixer import __version__
from dsmixer.adapters.card import license_of, model_card
from dsmixer.adapters.importing import Pool
from dsmixer.adapters.mixture_folder import (
    CARD_FILE,
    CONFIG_FILE,
    EXPERTS_FOLDER,
    FORMAT_VERSION,
    ROUTERS_FILE,
    is_mixture_folder,
    read_description,
)
from dsmixer.adapters.outside_peft import not_applied_by_peft
from dsmixer.adapters.peft_format import CONFIG_FILE as ADAPTER_CONFIG
from dsmixer.adapters.peft_format import WEIGHTS_FILE as ADAPTER_WEIGHTS
from dsmixer.adapters.peft_format import write_adapter
from dsmixer.adapters.peft_method import is_saved_by_peft, write_for_peft
from dsmixer.adapters.publish import published
from dsmixer.adapters.saved_mixture import ROUTER_KEY, read_routers
from dsmixer.config.errors import UserError
from dsmixer.model.mixer_config import MixerConfig

OTHER_FILES = (".json", ".txt", ".model", ".jinja")
"""Of the tokenizer, which comes along."""
OWN_FILES = (CONFIG_FILE, ROUTERS_FILE, CARD_FILE, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
HISTORY = "history"


@dataclass(frozen=True)
class Draft:
    """A mixture folder to be written.

    Attributes:
        source: the folder whose other files come along.
        about: what it says of its base.
        config: of its mixers.
        experts: where each expert is copied from, by its name.
        routers: ``G [E, D]`` by the path of the projection that owns it.
        history: what has been done to the pool since it was trained, a line each.
        imported: adapters that are no plain PEFT folders as they are, and are written anew.
    """

    source: Path
    about: Mapping[str, Any]
    config: MixerConfig
    experts: Mapping[str, Path]
    routers: Mapping[str, torch.Tensor]
    history: tuple[str, ...] = ()
    imported: Pool | None = None


def open_draft(folder: str | Path) -> Draft:
    """A mixture folder as it is.

    Raises:
        UserError: it is no mixture, or lacks an expert's folder, or its routers can't be read.
    """
    folder = Path(folder)
    about, config = read_description(folder)
    if is_saved_by_peft(folder):
        fix = "load it by load_mixture and save it by save_mixture(mixture_of(model), FOLDER)"
        raise UserError("PEFT saved it, all its weights in one file", where=str(folder), fix=fix)
    experts = {name: folder / EXPERTS_FOLDER / name for name in config.experts}
    for name, path in experts.items():
        if not (path / ADAPTER_CONFIG).is_file() or not (path / ADAPTER_WEIGHTS).is_file():
            problem = f"the expert {name} is not whole"
            raise UserError(problem, where=str(path), fix="copy the whole mixture again")
    return Draft(folder, about, config, experts, read_routers(folder, config), history_of(folder))


def history_of(folder: Path) -> tuple[str, ...]:
    """What was done to a published pool, a line each.

    Raises:
        UserError: its description holds something else there.
    """
    lines = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get(HISTORY, [])
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        where = f"{folder / CONFIG_FILE}: {HISTORY}"
        raise UserError("is no list of lines", where=where, fix="copy the whole mixture again")
    return tuple(lines)


def write_draft(draft: Draft, out: str | Path, *, in_place: bool = False) -> Path:
    """Write the folder; it appears whole or not at all.

    Args:
        draft: what to write.
        out: where.
        in_place: whether a mixture that is there, such as the one it was made from, is replaced.

    Raises:
        UserError: something is there already, or the disk refuses.
    """
    out = Path(out)
    for name in draft.config.experts:
        tensors = draft.routers.values()
        assert all(len(weight_ED) == len(draft.config.experts) for weight_ED in tensors), name
    with published(out, may_replace=lambda folder: in_place and is_mixture_folder(folder)) as part:
        for name in draft.config.experts:
            _copy_expert(draft, name, part / EXPERTS_FOLDER / name)
        routers = {f"{path}{ROUTER_KEY}": weight.contiguous() for path, weight in draft.routers.items()}
        save_file(routers, part / ROUTERS_FILE, metadata={"format": "pt"})
        for file in _other_files(draft.source):
            shutil.copyfile(file, part / file.name)
        description = _description(draft)
        write_for_peft(part, description, _task_type(draft.source))
        (part / CARD_FILE).write_text(_card(draft), encoding="utf-8")
        text = json.dumps(description, indent=2, sort_keys=True) + "\n"
        (part / CONFIG_FILE).write_text(text, encoding="utf-8")
    return out


def _copy_expert(draft: Draft, name: str, folder: Path) -> None:
    """Two files, bit for bit; nothing else that may lie beside them."""
    pool = draft.imported
    if pool is not None and name in pool.adapters:
        paths = pool.adapters[name].pairs
        matrices = {path: found for path in paths if (found := pool.matrices(name, path)) is not None}
        write_adapter(
            folder,
            matrices,
            rank=pool.ranks[name],
            alpha=pool.alphas[name],
            targets=list(matrices),
            rslora=pool.rslora,
            fan_in_fan_out=bool(pool.adapters[name].config.get("fan_in_fan_out")),
            base=draft.about.get("model"),
            revision=draft.about.get("revision"),
            task_type=_task_type(draft.source),
        )
        return
    folder.mkdir(parents=True)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(draft.experts[name] / file, folder / file)


def _other_files(source: Path) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in OTHER_FILES and path.name not in OWN_FILES:
            yield path


def _task_type(source: Path) -> str:
    """What PEFT calls the base's task, as the mixture's own ``adapter_config.json`` says."""
    path = source / ADAPTER_CONFIG
    if not path.is_file():
        return "CAUSAL_LM"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("task_type")
    except (ValueError, AttributeError) as error:
        raise UserError("is no JSON object", where=str(path), fix="copy the whole mixture again") from error
    return found if isinstance(found, str) else "CAUSAL_LM"


def _description(draft: Draft) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "dsmixer_version": __version__,
        "base": dict(draft.about),
        "mixer": draft.config.to_dict(),
        HISTORY: list(draft.history),
    }


def _card(draft: Draft) -> str:
    """The card of the changed pool: figures of the one before are not those of this one."""
    config = draft.config
    experts = [
        {"name": name, "rank": rank, "alpha": alpha}
        for name, rank, alpha in zip(config.experts, config.rank_list, config.alpha_list, strict=True)
    ]
    routing = config.default_routing()
    mode = f"{routing.mode}, K={routing.top_k}" if routing.mode in ("topk", "hard_soft") else routing.mode
    facts = {
        "base": draft.about.get("model"),
        "license": license_of(draft.source / CARD_FILE),
        "dsmixer_version": __version__,
        "targets": config.targets,
        "routing": mode,
        "experts": experts,
        "task_type": _task_type(draft.source),
        "not_applied": not_applied_by_peft(
            draft.about.get("model_type"),
            (target if "." in target else f"{target}_proj" for target in config.targets),
        ),
    }
    lines = "".join(f"- {line}\n" for line in draft.history)
    return (
        f"{model_card(facts)}\n## Changes of the pool\n\n{lines}\n"
        "After the last of these nothing was trained or evaluated.\n"
    )
