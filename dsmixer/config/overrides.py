"""``section.key=value`` overrides from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsmixer.config.errors import UserError
from dsmixer.config.yaml_text import parse_yaml

EXAMPLE = "write section.key=value, such as stage1.epochs=2"


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Put overrides over the raw values of a recipe, the later over the earlier.

    A value is read as YAML; a mapping is laid over the one that is there, key by key, anything else replaces
    it. A position addresses an entry of a list (``data.domains.0.train=FILE``), one after the last appends.

    Returns:
        New raw values, and for every key set the place it was set in.

    Raises:
        UserError: no ``=``, malformed YAML, or a path through something that has no keys.
    """
    merged: dict[str, Any] = _copy(raw)
    places: dict[str, str] = {}
    for text in overrides:
        where = f"command line: {text}"
        key, equals, value_text = text.partition("=")
        parts = key.split(".")
        if not equals:
            raise UserError("an override without '='", where=where, fix=EXAMPLE)
        if not all(part and part == part.strip() for part in parts):
            raise UserError(f"{key!r} is not a dotted key", where=where, fix=EXAMPLE)
        for path, value in _leaves(tuple(parts), parse_yaml(value_text, where).value):
            _set(merged, path, value, where)
            places[".".join(path)] = where
    return merged, places


def _leaves(path: tuple[str, ...], value: Any) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, below in value.items() for leaf in _leaves((*path, str(key)), below)]
    return [(path, _copy(value))]


def _set(raw: dict[str, Any], path: tuple[str, ...], value: Any, where: str) -> None:
    """Set one value, making the mappings (and, before a position, the list) that the path needs."""
    node: Any = raw
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        key = _position(node, part, path[:depth], where) if isinstance(node, list) else part
        if not isinstance(node, dict | list):
            walked = ".".join(path[:depth])
            raise UserError(
                f"{walked} is a value and has no key {part!r}", where=where, fix=f"write {walked}=..."
            )
        if last:
            _put(node, key, value)
            return
        if _get(node, key) is None:
            _put(node, key, [] if path[depth + 1].isdigit() else {})
        node = _get(node, key)


def _position(items: list[Any], part: str, path: tuple[str, ...], where: str) -> int:
    dotted = ".".join(path)
    if part.isdigit() and int(part) <= len(items):
        return int(part)
    named = [i for i, item in enumerate(items) if isinstance(item, dict) and item.get("name") == part]
    if named:
        fix = f"write {dotted}.{named[0]}"
    else:
        fix = f"write a position from 0 to {len(items)} (which appends)"
    raise UserError(
        f"{part!r} is not a position in {dotted}, which has {len(items)} entries", where=where, fix=fix
    )


def _get(node: Any, key: Any) -> Any:
    if isinstance(node, list):
        return node[key] if key < len(node) else None
    return node.get(key)


def _put(node: Any, key: Any, value: Any) -> None:
    if isinstance(node, list) and key == len(node):
        node.append(value)
    else:
        node[key] = value


def _copy(value: Any) -> Any:
    """A deep copy that shares nothing: YAML aliases give one object in several places."""
    if isinstance(value, dict):
        return {key: _copy(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_copy(below) for below in value]
    return value
