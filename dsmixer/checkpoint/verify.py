"""Whether a checkpoint folder is what was saved: its manifest and every file that it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmixer.checkpoint.parts import file_sha256
from dsmixer.checkpoint.schema import CONFIG, FORMAT, MANIFEST, STATE, other_format

Entries = dict[str, dict[str, Any]]
"""``bytes`` and ``sha256`` of each file by its name."""


class DamagedError(Exception):
    """A file of a checkpoint is not what was saved; the text names it."""


class UnreadableError(RuntimeError):
    """A file of a checkpoint can't be read now, which says nothing about what is in it."""


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """What it means that the system refuses to read: a disk that is away for a while damages nothing."""
    return UnreadableError(
        f"{path}: {error.strerror}; this says nothing about what is in it, and nothing was moved. Run the "
        "same command again, or go on from an older checkpoint with --from"
    )


def manifest_text(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The manifest, which vouches for itself too."""
    body = {"format": FORMAT, "files": {name: dict(entries[name]) for name in sorted(entries)}}
    return json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Entries:
    """The files of a checkpoint folder.

    Raises:
        DamagedError: the manifest is missing or damaged.
        UnreadableError: the system refuses to read it.
        UserError: another version of dsmixer wrote it.
    """
    manifest = path / MANIFEST
    try:
        body = json.loads(manifest.read_bytes())
    except FileNotFoundError as error:
        raise DamagedError(f"{manifest}: missing") from error
    except OSError as error:
        raise unreadable(manifest, error) from error
    except ValueError as error:
        raise DamagedError(f"{manifest}: not what was saved ({error})") from error
    if isinstance(body, dict) and set(body) == {"tensors.safetensors", STATE}:
        raise other_format(1, str(path))
    digest = body.pop("sha256", None) if isinstance(body, dict) else None
    if digest is None or digest != _digest(body):
        raise DamagedError(f"{manifest}: not what was saved (its own checksum differs)")
    if body["format"] != FORMAT:
        raise other_format(body["format"], str(path))
    entries: Entries = body["files"]
    assert {STATE, CONFIG} <= set(entries) and all(Path(name).name == name for name in entries)
    return entries


def file_damage(path: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a file of a checkpoint; None where it is what was saved.

    Raises:
        UnreadableError: the system refuses to read it.
    """
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path}: not what was saved ({size:,} bytes, and {entry['bytes']:,} were written)"
        if file_sha256(path) != entry["sha256"]:
            return f"{path}: not what was saved (its checksum differs)"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        raise unreadable(path, error) from error
    return None


def shared_out(entries: Entries, rank: int, size: int) -> list[str]:
    """The files that this one of ``size`` ranks looks at, so that all have about as many bytes to read."""
    loads = [0] * size
    own = []
    for name in sorted(entries, key=lambda name: (-int(entries[name]["bytes"]), name)):
        least = loads.index(min(loads))
        loads[least] += int(entries[name]["bytes"])
        if least == rank:
            own.append(name)
    return own


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file; None if every file is what was saved.

    Raises:
        UnreadableError: the system refuses to read a file.
        UserError: another version of dsmixer wrote it.
    """
    try:
        entries = read_manifest(path)
    except DamagedError as error:
        return str(error)
    found = (file_damage(path / name, entry) for name, entry in entries.items())
    return next((problem for problem in found if problem is not None), None)
