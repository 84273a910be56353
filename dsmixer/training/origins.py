"""What a run's numbers come from beside its recipe: the files of the base, and the installed libraries."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from transformers.utils import cached_file

from dsmixer.config.schema import BaseConfig

CONFIG_FILE = "config.json"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where transformers looks for weights, in its order."""
BLOCKS, BLOCK_BYTES = 16, 2**16
"""What is read of a file of weights beside its header: two models of one shape differ everywhere."""
LONGEST_HEADER = 10**8
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "safetensors")


def base_identity(base: BaseConfig) -> dict[str, str] | None:
    """Digests by which the base of a run is known again, wherever it lies.

    Of ``config.json`` the whole; of each file of weights its name and size, the header of safetensors, and
    some blocks: no gigabytes are read.

    Args:
        base: the recipe's section.

    Returns:
        ``config`` and ``weights``, hex; None for what is not here: a base of the hub still to be downloaded.

    Raises:
        OSError: a file can't be read.
    """
    folder = Path(base.model) if Path(base.model).is_dir() else _cached(base)
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return None
    files = _weight_files(folder)
    if not files or not all(path.is_file() for path in files):
        return None
    weights = hashlib.sha256()
    for path in files:
        weights.update(f"{path.name} {path.stat().st_size}\n".encode())
        for block in _blocks(path):
            weights.update(block)
    config = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    return {"config": config.hexdigest(), "weights": weights.hexdigest()}


def _cached(base: BaseConfig) -> Path | None:
    """The folder of a hub's base in this machine's cache; nothing is downloaded."""
    try:
        found = cached_file(base.model, CONFIG_FILE, revision=base.revision, local_files_only=True)
    except (OSError, ValueError):  # not there, or no name that a hub could have: what loads it will say so
        return None
    return None if found is None else Path(found).parent


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return _indexed(path) if name.endswith(".index.json") else [path]
    return []


def _indexed(index: Path) -> list[Path]:
    """The files that an index names; none where it can't be understood: what loads it will say so."""
    try:
        return sorted({index.parent / file for file in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _blocks(path: Path) -> Iterator[bytes]:
    """The header, and blocks at even distances to the end; of a small file everything."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            yield file.read(min(length, LONGEST_HEADER))
        last = max(0, size - BLOCK_BYTES)
        for start in sorted({last * i // (BLOCKS - 1) for i in range(BLOCKS)}):
            file.seek(start)
            yield file.read(BLOCK_BYTES)


def base_changes(saved: Mapping[str, str] | None, here: Mapping[str, str]) -> tuple[str, ...]:
    """How a base differs from the one that a run was trained on; nothing where that was not kept."""
    told = {"config": f"another {CONFIG_FILE}", "weights": "weights of another digest"}
    return tuple(
        f"base.model: {text} ({saved[key][:12]} there, {here[key][:12]} here)"
        for key, text in told.items()
        if saved is not None and saved.get(key, here[key]) != here[key]
    )


def installed_versions() -> dict[str, str]:
    """Of Python and the libraries that the numbers of a run depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def version_changes(saved: Mapping[str, str]) -> list[str]:
    """Where they are others than those that a checkpoint was saved with."""
    here = installed_versions()
    return [
        f"{name}: {old} there, {here[name]} here" for name, old in saved.items() if here.get(name, old) != old
    ]
