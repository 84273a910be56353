"""Names of a model's modules as its base has them, and the shortest names that say which are meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from dsmixer.model.mixed_linear import MixedLinear


def base_module_names(model: nn.Module) -> list[str]:
    """Module paths of the model as it was before mixers were attached, in its own order."""
    names: list[str] = []
    mixer_path: str | None = None
    for name, module in model.named_modules():
        if mixer_path is not None and name.startswith(f"{mixer_path}."):
            continue
        mixer_path = name if isinstance(module, MixedLinear) else None
        if name:
            names.append(name)
    return names


def shortest_names(paths: Collection[str], all_names: Iterable[str]) -> list[str]:
    """Trailing parts of module paths that match ``paths`` and no other module, as PEFT matches them.

    ``q_proj`` where every ``q_proj`` is meant; ``attn.c_proj`` where the MLP has a ``c_proj`` that is not;
    the whole path where nothing shorter tells it apart.

    Args:
        paths: the modules meant.
        all_names: all module paths of the model.
    """
    owners: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for name in all_names:
        for suffix in _suffixes(name):
            owners[suffix] = owners.get(suffix, 0) + 1
            if name in paths:
                wanted[suffix] = wanted.get(suffix, 0) + 1
    found: dict[str, None] = {}
    for path in paths:
        own = next((s for s in _suffixes(path) if owners.get(s) == wanted.get(s)), path)
        found[own] = None
    return sorted(found)


def _suffixes(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
