"""Checks raw values against the schema, and says what is wrong in the words of the recipe."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import ValidationError

from dsmixer.config.errors import UserError
from dsmixer.config.schema import NAME_PATTERN, Recipe

Node = dict[str, Any]
"""A node of the recipe's JSON schema."""


def validate_recipe(raw: dict[str, Any], where: Callable[[str], str]) -> Recipe:
    """The recipe of raw values.

    Args:
        raw: nested mappings and lists, as YAML gives them.
        where: from a dotted key to the place that an error names.

    Raises:
        UserError: unknown keys, missing keys, wrong types or values; all of them in one message.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        found: dict[str, UserError] = {}
        for item in error.errors(include_url=False, include_context=False):
            path, node = _resolve(item["loc"])
            if item["type"] == "extra_forbidden":
                problem = _unknown_key(path, node, str(item["loc"][len(path)]), where)
            elif item["type"] == "missing" and isinstance(path[-1], str):
                problem = _missing_key(path, node, where)
            else:
                if item["type"] == "missing":  # an entry of a list of fixed length: the list is too short
                    path, node = _resolve(path[:-1])
                problem = _wrong_value(path, node, _value_at(raw, path), where)
            found.setdefault(problem.where or "", problem)
        raise _joined(list(found.values())) from None


def describe(node: Node) -> str:
    """What a value of this schema node may be, in words: ``a number above 0 or null``."""
    node = _follow(node)
    if "anyOf" in node:
        return " or ".join(describe(option) for option in node["anyOf"])
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return "one of " + ", ".join(str(value) for value in node["enum"])
    kind = node.get("type")
    if kind == "string":
        if node.get("pattern") == NAME_PATTERN:
            return "a name of letters, digits, '.', '_' and '-' (at most 100, the first a letter or digit)"
        return "text"
    if kind == "integer" or kind == "number":
        return ("a whole number" if kind == "integer" else "a number") + _bounds(node)
    if kind == "array":
        if "prefixItems" in node:
            return f"a list of {len(node['prefixItems'])}, each entry {describe(node['prefixItems'][0])}"
        few = "a list that is not empty" if node.get("minItems") else "a list"
        return f"{few}, each entry {describe(node['items'])}"
    if kind == "object":
        return "a mapping"
    return {"boolean": "true or false", "null": "null"}[str(kind)]


def is_key(text: str) -> bool:
    """Whether this is a dotted key of a recipe, also of an entry of one of its lists."""
    parts = text.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:first]) in _all_keys()


def nearest_key(key: str, keys: list[str]) -> str | None:
    """The key that was probably meant, or None where nothing is near."""
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    return near[0] if near else None


def show(value: object) -> str:
    """A value as the user would recognise it, with the type YAML gave it, cut to a line."""
    if value is None:
        return "null"
    kinds: list[tuple[type, str]] = [
        (bool, "true or false"),
        (int, "a whole number"),
        (float, "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "a mapping"),
    ]
    kind = next((name for cls, name in kinds if isinstance(value, cls)), type(value).__name__)
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"


@cache
def _schema() -> Node:
    return Recipe.model_json_schema()


def _follow(node: Node) -> Node:
    """The node behind a reference; of a node that may be null, the other branch keeps its ``anyOf``."""
    if "$ref" in node:
        return dict(_schema()["$defs"][node["$ref"].rsplit("/", 1)[1]])
    return node


def _child(node: Node, part: str | int) -> Node | None:
    node = _follow(node)
    for option in node.get("anyOf", [node]):
        option = _follow(option)
        if isinstance(part, int) and option.get("type") == "array":
            items = option.get("prefixItems")
            return items[part] if items and part < len(items) else option.get("items")
        if isinstance(part, str) and part in option.get("properties", {}):
            return dict(option["properties"][part])
    return None


def _resolve(loc: tuple[str | int, ...]) -> tuple[tuple[str | int, ...], Node]:
    """The path in a recipe that ``loc`` means: pydantic puts the branches of unions into it too."""
    path: list[str | int] = []
    node: Node = _schema()
    for part in loc:
        below = _child(node, part)
        if below is None:
            continue
        path.append(part)
        node = below
    return tuple(path), node


def _value_at(raw: object, path: tuple[str | int, ...]) -> object:
    for part in path:
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
    return raw


def _bounds(node: Node) -> str:
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    parts = []
    if low is not None:
        parts.append(f"at least {low:g}")
    if above is not None:
        parts.append(f"above {above:g}")
    if high is not None:
        parts.append(f"at most {high}")
    if below is not None:
        parts.append(f"below {below:g}")
    return " " + " and ".join(parts) if parts else ""


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in path)


def _keys_of(node: Node) -> list[str]:
    node = _follow(node)
    return [key for option in node.get("anyOf", [node]) for key in _follow(option).get("properties", {})]


@cache
def _all_keys() -> tuple[str, ...]:
    """Every key of every section as ``section.key``, to find one that stands in the wrong section."""
    found: list[str] = []

    def walk(node: Node, prefix: str) -> None:
        for key in _keys_of(node):
            found.append(prefix + key)
            walk(_child(node, key) or {}, f"{prefix}{key}.")

    walk(_schema(), "")
    return tuple(found)


def _unknown_key(path: tuple[str | int, ...], node: Node, key: str, where: Callable[[str], str]) -> UserError:
    dotted = _dotted((*path, key))
    keys = _keys_of(node)
    elsewhere = [full for full in _all_keys() if full.rsplit(".", 1)[-1] == key]
    near = nearest_key(key, keys)
    if elsewhere and (near is None or difflib.SequenceMatcher(None, key, near).ratio() < 0.85):
        fix = f"write it as {' or '.join(elsewhere[:3])}"
    elif near is not None:
        fix = f"write {_dotted((*path, near))}"
    else:
        fix = f"remove it; the keys of {_dotted(path) or 'a recipe'} are {', '.join(keys)}"
    return UserError(f"unknown key {key!r}", where=where(dotted), fix=fix)


def _missing_key(path: tuple[str | int, ...], node: Node, where: Callable[[str], str]) -> UserError:
    """``path`` is never empty: a recipe itself is always there."""
    help_text = f" ({node['description']})" if "description" in node else ""
    fix = f"add {path[-1]}, {describe(node)}"
    return UserError(f"missing{help_text}", where=where(_dotted(path)), fix=fix)


def _wrong_value(
    path: tuple[str | int, ...], node: Node, value: object, where: Callable[[str], str]
) -> UserError:
    right = describe(node)
    keys = _entry_keys(node)
    fix = f"write {right}" + (f" with keys of {', '.join(keys)}" if keys else "")
    if "default" in node and node["default"] not in (None, []):
        fix += f"; the default is {_plain(node['default'])}"
    texts = [str(choice) for choice in _choices(node)]
    near = nearest_key(value, texts) if isinstance(value, str) else None
    if near is not None:
        fix = f"write {near}"
    elif (
        isinstance(value, str)
        and " list" in right
        and "mapping" not in right
        and "each entry a number" not in right
    ):
        fix = f"write a list: [{value}]"
    elif right.startswith(("text", "a name")) and isinstance(value, bool):
        fix = "put it in quotes: YAML reads yes, no, on and off as true or false"
    elif right.startswith(("text", "a name")) and isinstance(value, int | float):
        fix = f'put it in quotes, so that YAML reads text: "{value}"'
    return UserError(f"{show(value)} is not {right}", where=where(_dotted(path)), fix=fix)


def _entry_keys(node: Node) -> list[str]:
    """Keys of the mapping that a value, or an entry of a list, has to be; empty for anything else."""
    options = [_follow(option) for option in _follow(node).get("anyOf", [_follow(node)])]
    return [key for option in options for key in _keys_of(option.get("items", option))]


def _choices(node: Node) -> list[object]:
    node = _follow(node)
    options = node.get("anyOf", [node])
    return [
        choice for o in options for choice in (*o.get("enum", ()), *([o["const"]] if "const" in o else ()))
    ]


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _joined(errors: list[UserError]) -> UserError:
    """One error of several: the first in full, the others listed below its fix."""
    first, others = errors[0], errors[1:11]
    if not others:
        return first
    more = len(errors) - 1 - len(others)
    lines = [str(error) for error in others] + ([f"and {more} more"] if more else [])
    fix = "\n".join([f"{first.fix}", *lines])
    return UserError(first.problem, where=first.where, fix=fix)
