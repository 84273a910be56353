"""A recipe from a YAML file and the command line, and back to canonical YAML."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmixer.config.errors import UserError
from dsmixer.config.explain import is_key, show, validate_recipe
from dsmixer.config.from_mixture import with_mixture
from dsmixer.config.overrides import apply_overrides
from dsmixer.config.schema import Recipe
from dsmixer.config.stages import Section, Stage2Config, StageConfig
from dsmixer.config.yaml_text import dump_yaml, parse_yaml, read_text

STAGES = ("stage1", "stage2")


@dataclasses.dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where its values came from.

    Attributes:
        recipe: every key resolved.
        written: dotted keys that the user wrote, in the recipe or on the command line, with their values.
            Entries of lists of mappings are addressed by position: ``data.domains.0.train``.
        path: the recipe's file.
        places: dotted key to the place that set it, such as ``recipe.yaml:12: stage2.top_k``; also of keys
            that a DeepSpeed JSON file decided, which are not in ``written``.
    """

    recipe: Recipe
    written: dict[str, object]
    path: Path
    places: dict[str, str] = dataclasses.field(default_factory=dict)

    def where(self, key: str) -> str:
        """The place an error about this dotted key names: its own, or that of the nearest key around it."""
        return find_place(self.path, self.places, key)

    def said(self, key: str) -> bool:
        """Whether recipe, command line or DeepSpeed JSON file set this key, so that it can contradict."""
        return key in self.written or key in self.places

    def located(self, error: UserError) -> UserError:
        """An error that starts with a dotted key, with the file and line of that key before it.

        What reads data or a model knows the key that it was called for, and not where the user wrote it.
        """
        key, colon, rest = (error.where or "").partition(": ")
        if not is_key(key):
            return error
        return UserError(error.problem, where=f"{self.where(key)}{colon}{rest}", fix=error.fix)

    def stage(self, name: str) -> StageConfig:
        """The stage called ``stage1`` or ``stage2``."""
        return self.recipe.stage1 if name == "stage1" else self.recipe.stage2


def find_place(path: Path, places: Mapping[str, str], key: str) -> str:
    """The place of a dotted key, of the nearest key around it where it has none, or the file."""
    around = key
    while around not in places:
        if around == key or around.rsplit(".", 1)[-1].isdigit():
            below = [place for other, place in places.items() if other.startswith(f"{around}.")]
            if below:  # made by overrides of its keys alone
                return below[0]
        if "." not in around:
            return f"{path}: {key}"
        around = around.rsplit(".", 1)[0]
    place = places[around]
    if around == key or place.startswith("command line: "):
        return place
    return f"{place.removesuffix(f': {around}')}: {key}"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe and put ``section.key=value`` overrides over it.

    Relative paths in it stay as written. What follows from other keys is filled in as :func:`settle` says.

    Raises:
        UserError: for a file that cannot be read, is not YAML or is not a recipe, and for bad overrides.
    """
    text = parse_yaml(read_text(path, "recipe"), str(path))
    if text.value is None:
        fix = "write at least base.model and data.domains"
        raise UserError("the recipe is empty", where=str(path), fix=fix)
    if not isinstance(text.value, dict):
        problem = f"a recipe is a mapping of sections, and this is {show(text.value)}"
        raise UserError(problem, where=f"{path}:1", fix="begin with a section, such as base: {model: FOLDER}")
    places = {key: f"{path}:{line}: {key}" for key, line in text.lines.items()}
    return resolve_recipe(text.value, Path(path), places, overrides)


def resolve_recipe(
    raw: dict[str, Any], path: Path, places: Mapping[str, str], overrides: Sequence[str] = ()
) -> LoadedRecipe:
    """The recipe of raw values, with overrides put over them.

    Args:
        raw: sections, as YAML gives them.
        path: the file they come from.
        places: dotted key to the place that wrote it.
        overrides: ``section.key=value`` each.

    Raises:
        UserError: it is not a recipe, or an override is bad.
    """
    raw, set_there = apply_overrides(raw, overrides)
    raw = _without_empty_sections(raw, Recipe)
    if set_there.get("stage2.routing_loss") and raw["stage2"]["routing_loss"] != "lora_mixer":
        raw = without_rsl(raw, set_there)
    kept = {
        key: place
        for key, place in places.items()
        if not any(key.startswith(f"{replaced}.") for replaced in set_there)
    }
    kept.update(set_there)
    recipe = validate_recipe(raw, lambda key: find_place(path, kept, key))
    return settle(LoadedRecipe(recipe, dict(flatten(raw)), path, kept))


def without_rsl(raw: dict[str, Any], but: Collection[str] = ()) -> dict[str, Any]:
    """Without the settings of RSL, in whose place another loss was chosen; the ramp holds for all losses.

    Args:
        raw: sections, as YAML gives them.
        but: dotted keys that stay.
    """
    stage2 = raw.get("stage2")
    rsl = stage2.get("rsl") if isinstance(stage2, dict) else None
    if not isinstance(stage2, dict) or not isinstance(rsl, dict):
        return raw
    kept = {key: value for key, value in rsl.items() if key == "ramp" or f"stage2.rsl.{key}" in but}
    return {**raw, "stage2": {**stage2, "rsl": kept}}


def settle(loaded: LoadedRecipe) -> LoadedRecipe:
    """Fill in what follows from other keys.

    What a mixture that the run starts from decides stands in ``mixer`` and ``stage2``.
    Where nobody wrote them, ``stage2.top_k`` is at most the number of experts, and
    ``stage2.data.max_examples`` at most ``stage2.data.held_out``. ``gradient_accumulation_steps`` is null
    where nobody wrote it and ``global_batch_size`` decides. Idempotent.
    """
    mixer, stage2 = with_mixture(loaded)
    recipe = loaded.recipe.model_copy(update={"mixer": mixer, "stage2": stage2})
    loaded = dataclasses.replace(loaded, recipe=recipe)
    names = expert_names(recipe)
    changed: dict[str, StageConfig] = {}
    for name in STAGES:
        stage = loaded.stage(name)
        update: dict[str, object] = {}
        if stage.global_batch_size is not None and not loaded.said(f"{name}.gradient_accumulation_steps"):
            update["gradient_accumulation_steps"] = None
        if isinstance(stage, Stage2Config) and names and not loaded.said("stage2.top_k"):
            update["top_k"] = min(stage.top_k, len(names))
        if isinstance(stage, Stage2Config) and not loaded.said("stage2.data.max_examples"):
            few = min(stage.data.max_examples, stage.data.held_out or stage.data.max_examples)
            update["data"] = stage.data.model_copy(update={"max_examples": few})
        changed[name] = stage.model_copy(update=update)
    return dataclasses.replace(loaded, recipe=recipe.model_copy(update=changed))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every key in the schema's order; it loads back to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def resolved_differences(old_yaml_text: str, recipe: Recipe, ignore: Collection[str] = ()) -> list[str]:
    """How a saved ``config.yaml`` and this recipe differ: ``KEY: OLD there, NEW here``, empty if they do not.

    Args:
        old_yaml_text: the text of the saved file; keys that it lacks count with their defaults.
        recipe: the present recipe.
        ignore: dotted keys, or sections, that may differ.

    Raises:
        UserError: where the saved text is not a mapping in YAML.
    """
    raw = parse_yaml(old_yaml_text, "config.yaml").value
    if not isinstance(raw, dict):
        raise UserError("not a saved configuration", where="config.yaml", fix="choose another run.name")
    with contextlib.suppress(UserError):  # saved by another version: what it wrote is compared as it stands
        raw = validate_recipe(raw, lambda key: key).model_dump(mode="json")
    old, new = dict(flatten(raw)), dict(flatten(recipe.model_dump(mode="json")))
    absent = object()
    return [
        f"{key}: {_told(old.get(key, absent), absent)} there, {_told(new.get(key, absent), absent)} here"
        for key in dict.fromkeys((*old, *new))
        if old.get(key, absent) != new.get(key, absent)
        and not any(key == skip or key.startswith(f"{skip}.") for skip in ignore)
    ]


def expert_names(recipe: Recipe) -> list[str] | None:
    """Names of the experts, in order.

    Those of ``mixer.experts``, or else one a domain (``domain.expert`` or its name) in order of first
    appearance. None where a column of ``data.source`` names the domains: known once the data is read.
    """
    if recipe.mixer.experts is not None:
        return [expert.name for expert in recipe.mixer.experts]
    if recipe.data.source is not None:
        return None
    return list(dict.fromkeys(domain.expert or domain.name for domain in recipe.data.domains))


def flatten(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and values of nested mappings; entries of a list of mappings are addressed by position."""
    dot = f"{prefix}." if prefix else ""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from flatten(below, f"{dot}{key}")
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{dot}{index}")
    else:
        yield prefix, value


def _without_empty_sections(raw: dict[str, Any], model: type[Section]) -> dict[str, Any]:
    """Sections that stand empty in the file (``stage1:``) mean their defaults."""
    result = dict(raw)
    for key, field in model.model_fields.items():
        kind = field.annotation
        if key in result and isinstance(kind, type) and issubclass(kind, Section):
            below = {} if result[key] is None else result[key]
            result[key] = _without_empty_sections(below, kind) if isinstance(below, dict) else below
    return result


def _told(value: object, absent: object) -> str:
    return "absent" if value is absent else "null" if value is None else repr(value)
