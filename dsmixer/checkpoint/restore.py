"""Find the newest checkpoint that is whole, and read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from dsmixer.checkpoint.publish import file_sha256, list_checkpoints
from dsmixer.checkpoint.schema import MANIFEST, STATE, TENSORS, Checkpoint, CheckpointState


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file; None if its checksums hold."""
    manifest = path / MANIFEST
    try:
        entries = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        return f"{manifest}: {error}"
    if not isinstance(entries, dict) or set(entries) != {TENSORS, STATE}:
        return f"{manifest}: not a list of the checkpoint's files"
    for name, entry in entries.items():
        file = path / name
        if not file.is_file():
            return f"{file}: missing"
        if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
            return f"{file}: not what was saved (size or checksum differs)"
    return None


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a stage; each damaged one that is passed over is told to ``warn``."""
    for path in reversed(list_checkpoints(folder)):
        problem = damage(path)
        if problem is None:
            return path
        warn(f"{problem}; going back to the checkpoint before it")
    return None


def read_state(path: Path) -> CheckpointState:
    """The state alone."""
    return CheckpointState.from_dict(json.loads((path / STATE).read_text()), str(path / STATE))


def read_checkpoint(path: Path) -> Checkpoint:
    """All of a checkpoint whose checksums hold."""
    return Checkpoint(read_state(path), load_file(path / TENSORS))
