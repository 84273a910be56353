"""What a recipe names on the hub, and whether it is in the cache or can be reached."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from dsmixer.config.checks import is_local_path
from dsmixer.config.schema import Recipe
from dsmixer.training.machine.child import python_child
from dsmixer.training.machine.finding import Finding, ok, problem

MODULE = "dsmixer.training.machine.hub_probe"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
Name = tuple[str, str, str]
"""``model`` or ``dataset``, the id, and the revision or an empty text."""


def hub_names(recipe: Recipe) -> list[Name]:
    """Everything that the recipe names on the hub, once each."""
    named: list[Name] = []
    if not is_local_path(recipe.base.model):
        named.append(("model", recipe.base.model, recipe.base.revision or ""))
    data = recipe.data
    texts = [text for domain in data.domains for text in (domain.train, domain.test)]
    if data.source is not None:
        texts += [data.source.train, data.source.test]
    texts.append(recipe.stage2.data.source if recipe.stage2.enabled else None)
    for text in texts:
        if text is not None and not is_local_path(text):
            name, _, revision = text.partition("@")
            named.append(("dataset", name, revision))
    return list(dict.fromkeys(named))


def is_offline() -> bool:
    """Whether the hub is not to be asked."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE)


def is_cached(name: Name, cache: Path) -> bool:
    """Whether the cache has something of a model or data set, in any revision."""
    kind, text, _ = name
    folder = cache / f"{kind}s--{text.replace('/', '--')}" / "snapshots"
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def check_hub(names: list[Name], cache: Path, seconds: float) -> Iterator[Finding]:
    """Whether each of the names can be had.

    Args:
        names: of ``hub_names``.
        cache: of the hub.
        seconds: how long the hub may take.
    """
    missing = [name for name in names if not is_cached(name, cache)]
    if names and not missing:
        yield ok("hub", f"{_listed(names)}: in {cache}")
    if not missing:
        return
    if is_offline():
        fix = f"unset {' and '.join(OFFLINE)}, or bring them into the cache with hf download"
        yield problem("hub", f"offline, and not in {cache}: {_listed(missing)}", fix)
        return
    with python_child(MODULE, [json.dumps(missing)], seconds) as child:
        ended = child.ended()
    told = [json.loads(line) for line in ended.out.splitlines() if line.startswith('{"name"')]
    for answer in told:
        if answer["trouble"] is not None:
            yield problem("hub", f"{answer['name']}: {answer['trouble']}", answer["fix"])
    reached = [answer["name"] for answer in told if answer["trouble"] is None]
    if reached:
        yield ok("hub", f"can be downloaded: {', '.join(reached)}")
    if ended.trouble is not None:
        fix = "check the network and the proxy (HTTPS_PROXY), or HF_ENDPOINT if it is set"
        yield problem("hub", f"it can't be reached: {ended.trouble}", fix)


def _listed(names: list[Name]) -> str:
    return ", ".join(text for _, text, _ in names)
