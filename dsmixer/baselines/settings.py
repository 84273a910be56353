"""Settings of methods by name, as a file or a recipe gives them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dsmixer.baselines.interface import Method
from dsmixer.config.errors import UserError
from dsmixer.config.explain import nearest_key, show


def configured(
    methods: Mapping[str, Method], settings: Mapping[str, Any], where: str = "method settings"
) -> dict[str, Method]:
    """The methods, with settings put over their own.

    Args:
        methods: by name.
        settings: of some of them: ``{"mole": {"balance": 0.1, "fitting.steps": 100}}``; a mapping may stand
            for dots, ``{"fitting": {"steps": 100}}``.
        where: what an error names.

    Raises:
        UserError: no such method or setting, or no such value of it.
    """
    found = dict(methods)
    for name, values in settings.items():
        if name not in found:
            raise _unknown(f"{where}: {name}", "there is no method of this name here", name, list(found))
        if not isinstance(values, Mapping):
            fix = 'write {"setting": value, ...}'
            raise UserError(f"{show(values)} is no mapping of settings", where=f"{where}: {name}", fix=fix)
        for key, value in _dotted(values):
            found[name] = _with(found[name], key.split("."), value, f"{where}: {name}.{key}")
    return found


def settings_of(method: Any) -> dict[str, Any]:
    """The settings of a method by dotted name, with their values."""
    found: dict[str, Any] = {}
    for field in fields(method):
        value = getattr(method, field.name)
        if is_dataclass(value):
            found |= {f"{field.name}.{key}": below for key, below in settings_of(value).items()}
        else:
            found[field.name] = value
    return found


def _dotted(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{below}", inner) for below, inner in _dotted(value))
        else:
            yield key, value


def _with(owner: Any, path: list[str], value: Any, where: str) -> Any:
    """A dataclass with one field, or one below it, replaced."""
    first, *rest = path
    names = [field.name for field in fields(owner)]
    known = list(settings_of(owner))
    if first not in names or is_dataclass(getattr(owner, first, None)) != bool(rest):
        raise _unknown(where, "there is no such setting", ".".join(path), known)
    if rest:
        return replace(owner, **{first: _with(getattr(owner, first), rest, value, where)})
    return replace(owner, **{first: _checked(get_type_hints(type(owner))[first], value, where)})


def _checked(kind: Any, value: Any, where: str) -> Any:
    """A value of a field's type: counts are at least 1, and no number is negative or endless."""
    try:
        found = TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        told = error.errors()[0]["msg"]
        raise UserError(f"{show(value)}: {told}", where=where, fix="write a value of that kind") from error
    if isinstance(found, bool) or not isinstance(found, int | float):
        return found
    least = 1 if isinstance(found, int) else 0
    if not math.isfinite(found) or found < least:
        raise UserError(f"{show(value)} is not at least {least}", where=where, fix=f"write {least} or more")
    return found


def _unknown(where: str, problem: str, name: str, known: list[str]) -> UserError:
    inside = [key for key in known if key.endswith(f".{name}") or key.startswith(f"{name}.")]
    near = inside[0] if inside else nearest_key(name, known)
    return UserError(problem, where=where, fix=f"write {near or 'one of ' + ', '.join(known)}")
