"""PEFT's rule for which modules a configuration targets, and its patterns of ranks and alphas.

The rule is PEFT's own (``check_target_module_exists``, ``get_pattern_key``). What differs is that a pattern
of a stranger can't keep us busy: one that is more than a name is matched by a process that has half a second.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmixer.adapters import pattern_child
from dsmixer.adapters.untrusted import printable
from dsmixer.config.errors import UserError

SECONDS = 0.5
"""Processor time of one match of patterns against names."""
MEMORY = 2**30
MAX_NAMES = 5_000
MAX_LENGTH = 2_000
AT_ONCE = 200_000  # patterns times names that are matched without a process
_NAME = re.compile(r"[\w.\-]*")
_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


def targeted(config: Mapping[str, Any], targets: Any, names: Sequence[str], where: str) -> list[str]:
    """The names that PEFT would put an adapter on.

    Args:
        config: an ``adapter_config.json``, checked by :func:`check_rule`.
        targets: its ``target_modules``, a pattern or a list of names.
        names: module paths of the base.
        where: the file, for messages.

    Raises:
        UserError: a pattern is broken or takes too long.
    """
    kept = _without_excluded(config.get("exclude_modules"), names, where)
    if isinstance(targets, str):
        return _full_matches(targets, kept, f"{where}: target_modules")
    found = [name for name in kept if _ends_with_one(name, frozenset(targets))]
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return found
    wanted = {layers} if isinstance(layers, int) else set(layers)
    numbers = _layer_numbers(config.get("layers_pattern"), found, where)
    whole = set(targets)  # a name that is given whole is meant in whatever layer it is
    return [name for name, number in zip(found, numbers, strict=True) if name in whole or number in wanted]


def pattern_values(
    patterns: Mapping[str, Any], default: Any, paths: Sequence[str], where: str
) -> dict[str, Any]:
    """Each path's value: that of the first pattern that matches it or the end of it, else the default.

    Args:
        patterns: ``rank_pattern`` or ``alpha_pattern``.
        default: where nothing matches.
        paths: module paths.
        where: file and key, for messages.

    Raises:
        UserError: a pattern is broken or takes too long.
    """
    keys = list(patterns)
    found = _first_matches([rf"(.*\.)?({key})$" for key in keys], keys, paths, where, full=False)
    return {
        path: default if hit is None else patterns[keys[hit[0]]]
        for path, hit in zip(paths, found, strict=True)
    }


def check_rule(config: Mapping[str, Any], where: str) -> None:
    """Refuse targets of another kind than PEFT's, and more of them than a model has modules.

    Raises:
        UserError: names the key.
    """
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        names = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            _refuse(where, key, f"expected a pattern or a list of names, found {printable(value, 80)}")
        if len(names) > MAX_NAMES:
            _refuse(where, key, f"it lists {len(names):,} names, and at most {MAX_NAMES:,} are read")
        if any(len(name) > MAX_LENGTH for name in names):
            _refuse(where, key, f"a name or pattern is longer than {MAX_LENGTH:,} signs")
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        _refuse(where, "layers_to_transform", f"expected numbers of layers, found {printable(layers, 80)}")
    if isinstance(config.get("target_modules"), str) and (numbers or config.get("layers_pattern")):
        _refuse(where, "layers_to_transform", "it does not go together with a pattern as target_modules")


def _refuse(where: str, key: str, problem: str) -> None:
    raise UserError(problem, where=f"{where}: {key}", fix="save the adapter again with PEFT")


def _without_excluded(excluded: Any, names: Sequence[str], where: str) -> list[str]:
    if not excluded:
        return list(names)
    if isinstance(excluded, str):
        out = set(_full_matches(excluded, names, f"{where}: exclude_modules"))
        return [name for name in names if name not in out]
    return [name for name in names if not _ends_with_one(name, frozenset(excluded))]


def _ends_with_one(name: str, endings: frozenset[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[start:]) in endings for start in range(len(parts)))


def _layer_numbers(pattern: Any, names: Sequence[str], where: str) -> list[int | None]:
    patterns = [pattern] if isinstance(pattern, str) and pattern else list(pattern or [])
    rules = [rf"(?:^|.*?\.){own}\.(?P<idx>\d+)\." for own in patterns] or [_LAYER]
    found = _first_matches(rules, patterns, names, f"{where}: layers_pattern", full=False)
    return [None if hit is None or hit[1] is None else int(hit[1]) for hit in found]


def _full_matches(pattern: str, names: Sequence[str], where: str) -> list[str]:
    found = _first_matches([pattern], [pattern], names, where, full=True)
    return [name for name, hit in zip(names, found, strict=True) if hit is not None]


def _first_matches(
    rules: list[str], given: Sequence[str], names: Sequence[str], where: str, *, full: bool
) -> list[pattern_child.Found]:
    """``given``: the strangers' part of the rules, which says whether they can take long."""
    if len(rules) > MAX_NAMES or any(len(own) > MAX_LENGTH for own in given):
        problem = f"more than {MAX_NAMES:,} patterns, or one of more than {MAX_LENGTH:,} signs"
        raise UserError(problem, where=where, fix="write plain names of modules")
    harmless = len(rules) * len(names) <= AT_ONCE and all(_NAME.fullmatch(own) for own in given)
    if harmless:
        return pattern_child.first_matches(rules, names, full)
    return _in_child(rules, names, where, full)


def _in_child(rules: list[str], names: Sequence[str], where: str, full: bool) -> list[pattern_child.Found]:
    task = {"patterns": rules, "names": list(names), "full": full, "seconds": SECONDS, "bytes": MEMORY}
    script = str(Path(pattern_child.__file__))
    done = subprocess.run(
        [sys.executable, "-I", "-S", script],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        problem = f"the pattern can't be matched within {SECONDS:g} seconds of computing"
        raise UserError(problem, where=where, fix="write plain names of modules instead of a pattern")
    answer = json.loads(done.stdout)
    if "error" in answer:
        problem = f"the pattern is broken: {printable(answer['error'])}"
        raise UserError(problem, where=where, fix="correct it, or write plain names of modules")
    return [None if hit is None else (hit[0], hit[1]) for hit in answer["found"]]
