"""The rows of a comparison: its variants times the product of its axes, and the folders they are kept in."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsmixer.config.comparison import AxisSpec, LoadedComparison, VariantSpec

ITSELF = "mixture"
"""What the recipe itself is called, where a comparison names no variant."""

LONGEST = 60
UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class Change:
    """One key of the recipe that a variant sets.

    Attributes:
        key: dotted, of the recipe.
        value: of any kind that YAML has.
        place: where it is written.
    """

    key: str
    value: Any
    place: str


@dataclass(frozen=True)
class Variant:
    """One variant at one point of the axes.

    Attributes:
        label: what the table calls it, such as ``RSL, alpha=0.1``.
        name: of the variant alone.
        point: name and value of each axis.
        changes: of the recipe; a later one goes over an earlier one.
        folder: name of its folder.
    """

    label: str
    name: str
    point: tuple[tuple[str, Any], ...]
    changes: tuple[Change, ...]
    folder: str


def variants_of(loaded: LoadedComparison) -> list[Variant]:
    """All variants in the order of the file, the last axis changing fastest."""
    comparison = loaded.comparison
    specs = comparison.variants or (VariantSpec(name=ITSELF),)
    found = []
    for number, spec in enumerate(specs):
        own = [
            Change(key, value, loaded.where(f"comparison.variants.{number}.set.{key}"))
            for key, value in spec.set.items()
        ]
        for steps in itertools.product(*(range(len(axis.values)) for axis in comparison.axes)):
            found.append(_at(loaded, spec.name, own, steps))
    return found


def _at(loaded: LoadedComparison, name: str, own: Sequence[Change], steps: Sequence[int]) -> Variant:
    comparison = loaded.comparison
    changes, point = list(own), []
    for number, (axis, step) in enumerate(zip(comparison.axes, steps, strict=True)):
        place = loaded.where(f"comparison.axes.{number}.values.{step}")
        changes += [Change(key, value, place) for key, value in _set_by(axis, step)]
        point.append((axis.name, axis.values[step]))
    parts = [f"{axis}={value_text(value)}" for axis, value in point]
    folders = [f"{safe_name(axis)}={safe_name(value_text(value))}" for axis, value in point]
    if comparison.variants or not point:
        parts, folders = [name, *parts], [safe_name(name), *folders]
    return Variant(", ".join(parts), name, tuple(point), tuple(changes), _joined(folders))


def _set_by(axis: AxisSpec, step: int) -> Iterator[tuple[str, Any]]:
    yield axis.key, axis.values[step]
    for key, values in axis.also.items():
        yield key, values[step]


def value_text(value: Any) -> str:
    """A value of an axis as the table has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def safe_name(text: str) -> str:
    """A text as part of a folder's name: what is not a plain letter becomes ``-``, and a digest tells such
    names apart. Two texts never have one name, and a text has the same one in every comparison."""
    plain = UNSAFE.sub("-", text).strip(".-")[:LONGEST]
    return text if plain and plain == text else f"{plain or 'x'}-{_digest(text)}"


def _joined(parts: Sequence[str]) -> str:
    name = ",".join(parts)
    return name if len(name) <= 2 * LONGEST else f"{name[:LONGEST]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
