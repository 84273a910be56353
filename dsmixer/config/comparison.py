"""The file of a comparison: a recipe with the sections ``comparison`` and ``scales`` beside its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, WithJsonSchema

from dsmixer.config.comparison_text import check_comparison, merge_scale, validate_comparison
from dsmixer.config.errors import UserError
from dsmixer.config.explain import nearest_key, show
from dsmixer.config.overrides import apply_overrides
from dsmixer.config.recipe import find_place
from dsmixer.config.stages import Name, Section, Text
from dsmixer.config.yaml_text import parse_yaml, read_text

Value = Annotated[Any, WithJsonSchema({"const": "any value"})]
Label = Annotated[str, Field(min_length=1, max_length=100)]
Column = Literal["loss", "recovered", "accuracy", "accuracy_norm", "exact_match", "acc", "acc_norm", "pass@1"]
Measure = Literal[
    "routing_entropy",
    "load_variance",
    "own_first",
    "seconds",
    "seconds_per_step",
    "seconds_per_example",
    "tokens_per_second",
    "trainable",
    "peak_memory",
]
Plot = Literal["scores", "lines", "grid", "loads", "entropy", "losses"]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


class VariantSpec(Section):
    """One variant of the recipe: one row of the table."""

    name: Label = Field(description="name of the variant, as the table has it")
    set: dict[str, Value] = Field(
        default_factory=dict, description="keys of the recipe that it changes, such as stage2.top_k: 2"
    )


class AxisSpec(Section):
    """A key of the recipe that takes several values, for each variant."""

    name: Label = Field(description="name of the axis, as the table and the plots have it")
    key: Text = Field(description="the key of the recipe, such as stage2.rsl.alpha")
    values: Annotated[tuple[Value, ...], Strict(False)] = Field(min_length=1, description="its values")
    also: dict[str, Annotated[tuple[Value, ...], Strict(False)]] = Field(
        default_factory=dict,
        description="further keys that change with it, each with as many values, such as mixer.alpha",
    )


class PaperFigures(Section):
    """Figures of a paper, shown beside those of the comparison."""

    metric: Text = Field(description="what the figures are, such as accuracy")
    unit: str = Field(default="", description="unit of the figures, such as %")
    rows: dict[str, dict[str, float]] = Field(
        description="figures by row (a variant or a method) and by column (a domain, average or a measure)"
    )


class Comparison(Section):
    """What is compared, on which seeds, and how it is shown."""

    name: Name = Field(description="name of the comparison: its folder, unless run.name is written")
    title: Text = Field(description="title of the table and the page")
    source: Text | None = Field(default=None, description="table or figure that it is the counterpart of")
    note: Text | None = Field(default=None, description="what a reader must know of it")
    seeds: Annotated[tuple[Seed, ...], Strict(False)] = Field(
        default=(0, 1, 2), min_length=1, description="seeds, for each of which everything is run"
    )
    variants: Annotated[tuple[VariantSpec, ...], Strict(False)] = Field(
        default=(), description="the variants of the recipe; none: the recipe itself"
    )
    axes: Annotated[tuple[AxisSpec, ...], Strict(False)] = Field(
        default=(), description="keys with several values; their product is run for each variant"
    )
    methods: Annotated[tuple[Text, ...], Strict(False)] = Field(
        default=("own", "uniform"),
        description="other methods, as of dsmixer evaluate --methods, on the experts of stage one",
    )
    method_settings: dict[str, dict[str, Value]] = Field(
        default_factory=dict, description="settings of the methods by name, such as mole: {steps: 100}"
    )
    columns: Annotated[tuple[Column, ...], Strict(False)] = Field(
        default=("loss", "recovered", "accuracy"), min_length=1, description="figures a domain in the table"
    )
    measures: Annotated[tuple[Measure, ...], Strict(False)] = Field(
        default=("routing_entropy", "load_variance"), description="figures of a run as a whole"
    )
    plots: Annotated[tuple[Plot, ...], Strict(False)] = Field(
        default=("scores",), description="pictures of the page"
    )
    paper: Annotated[tuple[PaperFigures, ...], Strict(False), BeforeValidator(_as_list)] | None = Field(
        default=None, description="a paper's own figures, one mapping or a list of them; null: none"
    )


@dataclasses.dataclass(frozen=True)
class LoadedComparison:
    """A comparison, and the recipe that it varies as raw values.

    Attributes:
        comparison: what is compared.
        raw: the sections of the recipe, as YAML gives them, with scale and command line put over them.
        path: the comparison's file.
        scale: the scale that was chosen, or None for the full form.
        scales: the scales that the file has.
        places: dotted key of the recipe or of ``comparison`` to where it was written.
        overrides: what the command line has set, as it was written.
    """

    comparison: Comparison
    raw: dict[str, Any]
    path: Path
    scale: str | None = None
    scales: tuple[str, ...] = ()
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    def where(self, key: str) -> str:
        """The place an error about a key names."""
        return find_place(self.path, self.places, key)


def load_comparison(
    path: str | Path, scale: str | None = None, overrides: Sequence[str] = ()
) -> LoadedComparison:
    """Read a comparison's file; a scale's sections go over it, and ``section.key=value`` over both.

    The recipe in it is not checked here: each cell's is, once it is resolved.

    Raises:
        UserError: for a file that can't be read or is no comparison, an unknown scale, and bad overrides.
    """
    text = parse_yaml(read_text(path, "comparison"), str(path))
    if not isinstance(text.value, dict) or "comparison" not in text.value:
        found = f"; this is {show(text.value)}" if not isinstance(text.value, dict) else ""
        raise UserError(
            f"no section called comparison{found}",
            where=str(path),
            fix="add comparison: {name: NAME, title: TITLE, variants: [...]}; recipes are for dsmixer train",
        )
    places = {key: f"{path}:{line}: {key}" for key, line in text.lines.items()}
    raw, scales = dict(text.value), text.value.get("scales")
    raw.pop("scales", None)
    if scales is not None and not isinstance(scales, dict):
        fix = "write scales: {small: {base: {...}, ...}}"
        raise UserError(f"{show(scales)} is not a mapping", where=places["scales"], fix=fix)
    if scale is not None:
        raw, places = merge_scale(raw, _chosen(scales or {}, scale, path), scale, places)
    raw, set_there = apply_overrides(raw, overrides)
    places = {
        key: place
        for key, place in places.items()
        if not key.startswith("scales") and not any(key.startswith(f"{top}.") for top in set_there)
    } | set_there
    section = raw.pop("comparison")
    comparison = validate_comparison(
        Comparison, section, lambda key: find_place(Path(path), places, f"comparison.{key}".rstrip("."))
    )
    loaded = LoadedComparison(
        comparison, raw, Path(path), scale, tuple(scales or ()), places, tuple(overrides)
    )
    check_comparison(comparison, loaded.where, loaded.places)
    return loaded


def _chosen(scales: Mapping[str, Any], scale: str, path: str | Path) -> dict[str, Any]:
    if scale not in scales:
        near = nearest_key(scale, list(scales))
        known = f"one of {', '.join(scales)}" if scales else "no --scale: the file has none"
        raise UserError(
            f"no scale is called {scale!r}", where=f"{path}: scales", fix=f"write {near or known}"
        )
    value = scales[scale]
    if not isinstance(value, dict | None):
        fix = "write sections of a recipe there"
        raise UserError(f"{show(value)} is not a mapping", where=f"{path}: scales.{scale}", fix=fix)
    return value or {}
