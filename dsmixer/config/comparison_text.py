"""Raw values of a comparison: a scale merged over them, their errors in words, and what must go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from dsmixer.config.errors import UserError
from dsmixer.config.explain import describe, nearest_key, show
from dsmixer.config.stages import Section

if TYPE_CHECKING:
    from dsmixer.config.comparison import Comparison

SCORED = ("evaluation.max_examples",)
"""Keys that decide which examples are scored: base, experts and other methods answer those of the file."""

OWN_KEYS = ("run.seed", "run.name", "run.dir")
"""Keys of a recipe that a comparison decides for each of its cells, and no variant may change."""

REFERENCES = ("base", "own expert", "majority class")
"""Rows that every table has."""

Model = TypeVar("Model", bound=Section)
Node = dict[str, Any]


def merge_scale(
    raw: Mapping[str, Any], over: Mapping[str, Any], scale: str, places: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """A scale's sections over those of the file: mappings deep, anything else replaced.

    Returns:
        The merged values, and the place of every key: of what the scale writes, the place there.
    """
    prefix = f"scales.{scale}."
    merged, replaced = _merged(raw, over, ())
    kept = {
        key: place
        for key, place in places.items()
        if not any(key == gone or key.startswith(f"{gone}.") for gone in replaced)
    }
    for key, place in places.items():
        if key.startswith(prefix):
            own = key.removeprefix(prefix)
            kept[own] = f"{place.removesuffix(key)}{own}"
    return merged, kept


def _merged(under: Any, over: Any, path: tuple[str, ...]) -> tuple[Any, list[str]]:
    """The merged value, and the keys whose values were replaced whole."""
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over, [".".join(path)]
    result, replaced = dict(under), []
    for key, value in over.items():
        if key in under:
            result[key], gone = _merged(under[key], value, (*path, key))
            replaced += gone
        else:
            result[key] = value
    return result, replaced


def validate_comparison(model: type[Model], raw: Any, where: Callable[[str], str]) -> Model:
    """The section ``comparison`` of raw values.

    Args:
        model: its schema.
        raw: what stands there.
        where: from a dotted key in the section to the place that an error names.

    Raises:
        UserError: the first unknown key, missing key or wrong value.
    """
    if not isinstance(raw, dict):
        fix = "write a mapping with at least name and title"
        raise UserError(f"{show(raw)} is not a mapping", where=where(""), fix=fix)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        item = error.errors(include_url=False, include_context=False)[0]
        path, node = _resolved(model, item["loc"])
        dotted = ".".join(map(str, path))
        if item["type"] == "extra_forbidden":
            raise _unknown(node, str(item["loc"][-1]), dotted, where) from None
        if item["type"] == "missing":
            fix = f"add {path[-1]}: {node.get('description', '')}"
            raise UserError("missing", where=where(dotted), fix=fix) from None
        value = _value_at(raw, path)
        right = describe(node)
        near = nearest_key(value, _choices(node)) if isinstance(value, str) else None
        fix = f"write {near or right}"
        raise UserError(f"{show(value)} is not {right}", where=where(dotted), fix=fix) from None


def check_comparison(comparison: Comparison, where: Callable[[str], str], places: Mapping[str, str]) -> None:
    """Refuse what stands twice, axes of uneven length, and keys that are not a variant's to change.

    Raises:
        UserError: names the place.
    """
    for key, names in (
        ("variants", [variant.name for variant in comparison.variants]),
        ("axes", [axis.name for axis in comparison.axes]),
        ("seeds", list(comparison.seeds)),
        ("methods", list(comparison.methods)),
    ):
        for index, name in enumerate(names):
            if name in names[:index]:
                place = where(f"comparison.{key}.{index}")
                raise UserError(f"{name!r} stands there twice", where=place, fix="keep one of the two")
    taken = {*comparison.methods, *REFERENCES}
    for index, variant in enumerate(comparison.variants):
        if variant.name in taken:
            place = where(f"comparison.variants.{index}.name")
            raise UserError(f"the table has another row {variant.name!r}", where=place, fix="rename it")
    for index, axis in enumerate(comparison.axes):
        told = [str(value) for value in axis.values]
        if len(set(told)) < len(told):
            place = where(f"comparison.axes.{index}.values")
            raise UserError("a value stands there twice", where=place, fix="keep one of the two")
        for key, values in axis.also.items():
            if len(values) != len(axis.values):
                raise UserError(
                    f"{len(values)} values, and {axis.key} has {len(axis.values)}",
                    where=where(f"comparison.axes.{index}.also.{key}"),
                    fix="give as many values",
                )
    _check_keys(comparison, where, places)
    for name in comparison.method_settings:
        if name not in comparison.methods:
            near = nearest_key(name, list(comparison.methods))
            raise UserError(
                f"settings for {name!r}, which is none of comparison.methods",
                where=where(f"comparison.method_settings.{name}"),
                fix=f"write {near}" if near else "add it to comparison.methods, or remove the settings",
            )


def changed_keys(comparison: Comparison) -> Iterator[tuple[str, str, Any]]:
    """The place in ``comparison``, the recipe's key and the value of all that variants and axes change."""
    for index, variant in enumerate(comparison.variants):
        for key, value in variant.set.items():
            yield f"comparison.variants.{index}.set.{key}", key, value
    for index, axis in enumerate(comparison.axes):
        yield f"comparison.axes.{index}.key", axis.key, axis.values
        for key, values in axis.also.items():
            yield f"comparison.axes.{index}.also.{key}", key, values


def _check_keys(comparison: Comparison, where: Callable[[str], str], places: Mapping[str, str]) -> None:
    for place, key, _ in changed_keys(comparison):
        if any(key == own or own.startswith(f"{key}.") for own in OWN_KEYS):
            raise UserError(
                f"{key} is not a variant's to change: each cell has its own",
                where=where(place),
                fix="remove it; seeds are listed in comparison.seeds, and run.dir stands in the section run",
            )
        if key in SCORED:
            raise UserError(
                f"{key} is not a variant's to change: base and experts are scored once, as the file has it",
                where=where(place),
                fix="write it in the section evaluation, for all of them",
            )
        said = next((other for other in places if other == key or other.startswith(f"{key}.")), None)
        if said is not None and places[said].startswith("command line: "):
            raise UserError(
                f"{where(place)} sets this key itself",
                where=places[said],
                fix="change it there, or leave it out of the command line",
            )
    if "run.seed" in places:
        fix = "write comparison.seeds, or --seeds 0,1,2"
        raise UserError("the seeds of a comparison are a list", where=places["run.seed"], fix=fix)


def _resolved(model: type[Section], loc: tuple[int | str, ...]) -> tuple[list[int | str], Node]:
    """The path that an error's location means, and the schema there, with its references filled in."""
    schema = model.model_json_schema()
    node: Node = _filled(schema, schema.get("$defs", {}))
    path: list[int | str] = []
    for part in loc:
        below = _child(node, part)
        if below is not None:
            path.append(part)
            node = below
    return path, node


def _filled(node: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(node, dict):
        if "$ref" in node:
            node = {**definitions[node["$ref"].rsplit("/", 1)[1]], **node}
            del node["$ref"]
        return {key: _filled(value, definitions) for key, value in node.items() if key != "$defs"}
    return [_filled(value, definitions) for value in node] if isinstance(node, list) else node


def _child(node: Node, part: int | str) -> Node | None:
    for option in node.get("anyOf", [node]):
        if isinstance(part, int) and option.get("type") == "array":
            return dict(option["items"])
        if isinstance(part, str) and part in option.get("properties", {}):
            return dict(option["properties"][part])
        below = option.get("additionalProperties")
        if isinstance(part, str) and isinstance(below, dict):
            return below
    return None


def _unknown(node: Node, key: str, around: str, where: Callable[[str], str]) -> UserError:
    keys = [name for option in node.get("anyOf", [node]) for name in option.get("properties", {})]
    near = nearest_key(key, keys)
    fix = f"write {near}" if near else f"remove it; the keys there are {', '.join(keys)}"
    return UserError(f"unknown key {key!r}", where=where(f"{around}.{key}".lstrip(".")), fix=fix)


def _choices(node: Node) -> list[str]:
    return [str(value) for option in node.get("anyOf", [node]) for value in option.get("enum", ())]


def _value_at(raw: Any, path: list[int | str]) -> Any:
    for part in path:
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
    return raw
