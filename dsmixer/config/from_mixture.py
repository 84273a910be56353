"""A recipe that starts from a published mixture: what the mixture decides, and what then contradicts it.

The description of a mixture, ``mixer_config.json``, is read here as plain values; whether its adapters and
routers are whole is seen where they are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dsmixer.config.errors import UserError
from dsmixer.config.schema import ExpertSpec, MixerSection
from dsmixer.config.stages import Stage2Config
from dsmixer.config.yaml_text import parse_yaml, read_text

if TYPE_CHECKING:
    from dsmixer.config.recipe import LoadedRecipe

MIXTURE_FILE = "mixer_config.json"
RUN_FILE = "config.yaml"
"""Of the run that has made a mixture, beside its folder."""
DECIDED = ("targets", "rank", "alpha", "rslora", "router")
"""Keys of ``mixer`` that are the mixture's, beside ``experts``."""
ROUTING = ("routing", "top_k", "renormalize", "top_p")
"""Keys of ``stage2`` that go on as the mixture has them where nobody wrote them."""
FIX = "give the folder of a mixture, runs/NAME/mixture, or of a run that has finished"


def mixture_folder(path: str) -> Path:
    """The mixture that a folder is, or, of a run's folder, holds."""
    folder = Path(path)
    inside = folder / "mixture"
    return inside if not (folder / MIXTURE_FILE).is_file() and (inside / MIXTURE_FILE).is_file() else folder


def with_mixture(loaded: LoadedRecipe) -> tuple[MixerSection, Stage2Config]:
    """The sections ``mixer`` and ``stage2`` with what follows from ``mixer.mixture``.

    What the user wrote stays, so that ``check_mixture`` can hold it against the mixture. A mixture that
    can't be read changes nothing: a finished run's configuration is read where the mixture it started from
    is long gone.
    """
    mixer, stage2 = loaded.recipe.mixer, loaded.recipe.stage2
    if mixer.mixture is None:
        return mixer, stage2
    try:
        values, experts = _described(mixture_folder(mixer.mixture))
    except UserError:
        return mixer, stage2
    update: dict[str, Any] = {
        key: values[key] for key in (*DECIDED, "dropout") if not loaded.said(f"mixer.{key}")
    }
    if not _writes_experts(loaded):
        update["experts"] = experts
    return mixer.model_copy(update=update), stage2.model_copy(update=_routing(loaded, values))


def _routing(loaded: LoadedRecipe, values: Mapping[str, Any]) -> dict[str, Any]:
    """How stage two goes on, and the mixture that comes of it routes: as in the run, where nobody wrote it.

    A mixture's description says how it routes in use. Where its run trained it in another way
    (``inference_routing``), stage two trains in that way, too, and the mixture goes on to route as published.
    """
    assert loaded.recipe.mixer.mixture is not None
    found = {key: values[key] for key in ROUTING if not loaded.said(f"stage2.{key}")}
    trained = _trained_apart(mixture_folder(loaded.recipe.mixer.mixture), values["routing"])
    if trained is None:
        return found
    if "routing" in found:
        found["routing"] = trained
    as_trained = found.get("routing", loaded.recipe.stage2.routing) == trained
    if as_trained and not loaded.said("stage2.inference_routing"):
        found["inference_routing"] = values["routing"]
    return found


def _trained_apart(folder: Path, used: str) -> str | None:
    """The routing of the stage two that a mixture comes from, where it is not the one that it has in use.

    None as well where no run is around the mixture: nothing else says how it was trained.
    """
    path = folder.parent / RUN_FILE
    try:
        stage2 = parse_yaml(read_text(path, "configuration"), str(path)).value["stage2"]
        trained, apart, enabled = (stage2[key] for key in ("routing", "inference_routing", "enabled"))
        Stage2Config(routing=trained, inference_routing=apart)
    except (UserError, KeyError, TypeError, ValidationError):
        return None
    return str(trained) if enabled and apart == used != trained else None


def check_mixture(loaded: LoadedRecipe) -> None:
    """Refuse a mixture that is not there, and keys that say otherwise than it does.

    Raises:
        UserError: names the key and the mixture's file, with both values.
    """
    mixer = loaded.recipe.mixer
    if mixer.mixture is None:
        if mixer.transfer:
            raise UserError(
                "a transfer is that of a published mixture, and none is named",
                where=loaded.where("mixer.transfer"),
                fix="write mixer.mixture: FOLDER, or remove it",
            )
        return
    folder = mixture_folder(mixer.mixture)
    try:
        values, experts = _described(folder)
    except UserError as error:
        raise UserError(error.problem, where=loaded.where("mixer.mixture"), fix=error.fix) from error
    for key in DECIDED:
        written = getattr(mixer, key)
        if written != values[key]:
            _refuse(loaded, f"mixer.{key}", written, values[key], folder)
    _check_experts(loaded, experts, folder)


def _check_experts(loaded: LoadedRecipe, experts: tuple[ExpertSpec, ...], folder: Path) -> None:
    written = loaded.recipe.mixer.experts or ()
    names = [spec.name for spec in experts]
    if [spec.name for spec in written] != names:
        told = ", ".join(spec.name for spec in written)
        _refuse(loaded, "mixer.experts", told, ", ".join(names), folder)
    for index, (spec, own) in enumerate(zip(written, experts, strict=True)):
        for key in ("rank", "alpha", "path"):
            value = getattr(spec, key)
            if value is not None and value != getattr(own, key):
                _refuse(loaded, f"mixer.experts.{index}.{key}", value, getattr(own, key), folder)


def _refuse(loaded: LoadedRecipe, key: str, written: object, own: object, folder: Path) -> None:
    shown = [list(value) if isinstance(value, tuple) else value for value in (written, own)]
    raise UserError(
        f"{shown[0]} is written, and the mixture has {shown[1]} ({folder / MIXTURE_FILE})",
        where=loaded.where(key),
        fix=f"remove {key}: it comes with mixer.mixture; or change the mixture first with dsmixer pool",
    )


def _writes_experts(loaded: LoadedRecipe) -> bool:
    if loaded.written.get("mixer.experts") is not None:
        return True
    return any(key.startswith("mixer.experts.") for key in loaded.written)


def _described(folder: Path) -> tuple[dict[str, Any], tuple[ExpertSpec, ...]]:
    """Keys of ``mixer`` and ``stage2`` by name, and the experts, as a mixture's description has them.

    Raises:
        UserError: there is none, or it can't be understood.
    """
    path = folder / MIXTURE_FILE
    if not path.is_file():
        where = "" if folder.is_absolute() else f", taken from {os.getcwd()}"
        problem = f"has no {MIXTURE_FILE}" if folder.is_dir() else f"is no folder{where}"
        raise UserError(f"{folder} {problem}", fix=FIX)
    try:
        mixer = json.loads(path.read_text(encoding="utf-8"))["mixer"]
        experts = tuple(_spec(mixer, name) for name in mixer["experts"])
        values = {key: mixer[key] for key in ("rslora", "router", "dropout", "routing", "renormalize")}
        top_k = mixer.get("top_k") or min(3, len(experts))
        # where each expert has its own beside it, this one decides nothing
        values |= {key: max(getattr(spec, key) for spec in experts) for key in ("rank", "alpha")}
        values |= {"targets": tuple(mixer["targets"]), "top_k": top_k, "top_p": mixer["top_p"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        told = str(error).splitlines()[0]
        problem = f"{path} is no description of a mixture ({type(error).__name__}: {told})"
        raise UserError(problem, fix=FIX) from error
    return values, experts


def _spec(mixer: Mapping[str, Any], name: str) -> ExpertSpec:
    rank, alpha = mixer["ranks"].get(name, mixer["rank"]), mixer["alphas"].get(name, mixer["alpha"])
    return ExpertSpec(name=name, rank=rank, alpha=float(alpha))
