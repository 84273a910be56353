"""The recipes of a comparison's cells: the whole recipe of a variant, its stage one, and its stage two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmixer.compare.variants import Change, Variant
from dsmixer.config.changes import LAYOUT
from dsmixer.config.comparison import LoadedComparison
from dsmixer.config.errors import UserError
from dsmixer.config.from_mixture import DECIDED
from dsmixer.config.overrides import apply_overrides
from dsmixer.config.recipe import LoadedRecipe, flatten, resolve_recipe, without_rsl
from dsmixer.config.schema import Recipe
from dsmixer.config.yaml_text import dump_yaml

COMMAND_LINE = "command line: "
NOT_OF_TRUNK = ("run", "evaluation", "checkpoint", "health", "stage2")
IN_TRUNK = ("stage2.data.held_out", "stage2.data.max_share", "stage1.micro_batch_size")
"""Keys that are part of stage one all the same: a micro-batch of another size makes steps of other rows."""
Raw = dict[str, Any]


@dataclass(frozen=True)
class VariantRecipe:
    """A variant's whole recipe on one seed.

    Attributes:
        variant: whose.
        loaded: resolved, every key with the place that set it.
        raw: its values as they are written, without defaults.
    """

    variant: Variant
    loaded: LoadedRecipe
    raw: Raw

    @property
    def trains_experts(self) -> bool:
        """Whether stage one is a cell of its own, that variants may share."""
        return self.loaded.recipe.stage1.enabled and self.loaded.recipe.stage2.enabled

    def with_raw(self, raw: Raw) -> LoadedRecipe:
        """Another recipe made of this one; of keys that it lacks, nobody has said anything."""
        there = set(_keys(raw))
        places = {key: place for key, place in self.loaded.places.items() if key in there}
        return told_of(self.variant, lambda: resolve_recipe(raw, self.loaded.path, places))


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested values, those of mappings and lists themselves among them."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in pairs:
        yield f"{prefix}{key}"
        yield from _keys(below, f"{prefix}{key}.")


def told_of(variant: Variant, work: Any) -> Any:
    """What ``work`` returns; its error names the variant too.

    Raises:
        UserError: as ``work`` does.
    """
    try:
        return work()
    except UserError as error:
        problem = f"variant {variant.label!r}: {error.problem}"
        raise UserError(problem, where=error.where, fix=error.fix) from error


def variant_recipe(loaded: LoadedComparison, variant: Variant, seed: int) -> VariantRecipe:
    """The whole recipe of a variant.

    Raises:
        UserError: a change is of an unknown key or a wrong value; it names the line of the change.
    """
    raw, places = loaded.raw, dict(loaded.places)
    raw = _without_other_loss(raw, variant.changes)
    for change in variant.changes:
        raw, set_there = _changed(raw, change)
        for key in list(places):
            if any(key == top or key.startswith(f"{top}.") for top in set_there):
                del places[key]
        places.update(set_there)
    raw = {**raw, "run": {**(raw.get("run") or {}), "seed": seed}}
    resolved = told_of(variant, lambda: resolve_recipe(raw, loaded.path, places))
    return VariantRecipe(variant, resolved, raw)


def _changed(raw: Raw, change: Change) -> tuple[Raw, dict[str, str]]:
    """The raw values with one change, and the places of the keys that it sets."""
    try:
        raw, there = apply_overrides(raw, [f"{change.key}={dump_yaml(change.value)}"])
    except UserError as error:
        raise UserError(error.problem, where=change.place, fix=error.fix) from error
    if change.place.startswith(COMMAND_LINE):
        return raw, dict.fromkeys(there, change.place)
    line = change.place.rpartition(": ")[0]
    return raw, {key: f"{line}: {key}" for key in there}


def _without_other_loss(raw: Raw, changes: Sequence[Change]) -> Raw:
    """Without the recipe's settings of RSL, where the variant chooses another loss in its place."""
    chosen = [change.value for change in changes if change.key == "stage2.routing_loss"]
    return raw if not chosen or chosen[-1] == "lora_mixer" else without_rsl(raw)


def experts_raw(whole: VariantRecipe, folder: Path, evaluation: Raw) -> Raw:
    """Stage one of a recipe alone: what the routers will train on is kept from it all the same.

    The experts and the base are scored, each on every domain; of stage two nothing is written, so that the
    published mixture routes by the defaults, which a variant's own keys then go over.

    Args:
        whole: of any of the variants that share the experts.
        folder: of the cell.
        evaluation: the section of the file, whatever a variant changes in it.
    """
    recipe = whole.loaded.recipe
    data: Raw = {}
    if recipe.stage2.data.source is None:
        held_out = _held_out(whole)
        data = {
            "held_out": held_out,
            "max_examples": held_out,
            "max_share": recipe.stage2.data.max_share,
        }
    evaluation = {**evaluation, "methods": ["base", "experts"], "tasks": []}
    stage2 = {"enabled": False, **({"data": data} if data else {})}
    return _in_folder({**whole.raw, "stage2": stage2, "evaluation": evaluation}, folder)


def routers_raw(whole: VariantRecipe, folder: Path, experts: Path) -> Raw:
    """Stage two of a recipe alone, on the mixture that the experts' cell has published.

    Args:
        whole: the variant's recipe.
        folder: of the cell.
        experts: run folder of the experts' cell.
    """
    dropped = (*DECIDED, "experts", "mixture", "transfer", "router_std")
    mixer = {key: value for key, value in _section(whole, "mixer").items() if key not in dropped}
    stage2 = _section(whole, "stage2")
    if whole.loaded.recipe.stage2.data.source is None:
        stage2 = {**stage2, "data": {**(stage2.get("data") or {}), "held_out": _held_out(whole)}}
    raw = {
        **whole.raw,
        "stage1": {"enabled": False},
        "stage2": stage2,
        "mixer": {**mixer, "mixture": str(experts / "mixture")},
        "evaluation": {"methods": ["mixture"], **_section(whole, "evaluation")},
    }
    return _in_folder(raw, folder)


def whole_raw(whole: VariantRecipe, folder: Path) -> Raw:
    """The whole recipe as one cell, where there are no experts to share: they are ready-made, or alone.

    What it is compared with is scored in the cell itself: the base, and the experts as stage two found them.
    """
    recipe = whole.loaded.recipe
    moved = recipe.stage2.enabled and recipe.stage2.experts == "preserve"
    methods = ["base", "experts@stage1" if moved else "experts", "mixture"]
    evaluation = {"methods": methods, **_section(whole, "evaluation")}
    return _in_folder({**whole.raw, "evaluation": evaluation}, folder)


def trunk_digest(whole: VariantRecipe) -> str:
    """Of all that stage one is made of: variants with the same share their experts.

    Where and how the same numbers are computed is no part of it.
    """
    experts = whole.loaded.recipe.model_dump(mode="json")
    experts["stage2"]["data"]["held_out"] = _held_out(whole)
    left_out = (*NOT_OF_TRUNK, *LAYOUT)
    kept = {
        key: value
        for key, value in flatten(experts)
        if key in IN_TRUNK or not any(key == out or key.startswith(f"{out}.") for out in left_out)
    }
    kept["cell of its own"] = whole.trains_experts
    return _digest(kept)


def recipe_digest(recipe: Recipe) -> str:
    """Of all that decides a cell's figures, wherever it lies and whichever folder its experts come from."""
    left_out = ("run.name", "run.dir", "mixer.mixture")
    kept = {key: value for key, value in flatten(recipe.model_dump(mode="json")) if key not in left_out}
    return _digest(kept)


def _digest(values: Raw) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _held_out(whole: VariantRecipe) -> int | None:
    data = whole.loaded.recipe.stage2.data
    return None if data.source is not None else data.held_out or data.max_examples


def _section(whole: VariantRecipe, name: str) -> Raw:
    return dict(whole.raw.get(name) or {})


def _in_folder(raw: Raw, folder: Path) -> Raw:
    run = {**raw["run"], "dir": str(folder.parent), "name": folder.name}
    return {**raw, "run": run}
