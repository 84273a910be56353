"""Save a checkpoint so that it is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from dsmixer.checkpoint.schema import MANIFEST, STATE, STEP_PATTERN, TENSORS, Checkpoint, step_name

SAVING = ".saving-"


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write under a temporary name, flush, and publish by rename; then drop the oldest beyond ``keep``.

    Args:
        folder: of the stage, such as ``runs/NAME/checkpoints/stage1``.
        checkpoint: what to save.
        keep: checkpoints of the stage that stay.

    Raises:
        OSError: no space, or no right to write; what was there before is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_unfinished(folder)
    target = folder / step_name(checkpoint.state.step)
    building = folder / f"{SAVING}{target.name}"
    building.mkdir()
    try:
        _write(building, checkpoint)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise as_os_error(error, folder) from error
    if target.exists():
        shutil.rmtree(target)
    os.rename(building, target)
    _flush(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def _write(building: Path, checkpoint: Checkpoint) -> None:
    tensors = {key: tensor.contiguous() for key, tensor in checkpoint.tensors.items()}
    save_file(tensors, building / TENSORS)
    (building / STATE).write_text(json.dumps(checkpoint.state.to_dict(), indent=1))
    entries = {name: _entry(building / name) for name in (TENSORS, STATE)}
    (building / MANIFEST).write_text(json.dumps(entries, indent=1))
    for name in (TENSORS, STATE, MANIFEST):
        _flush(building / name)


def as_os_error(error: OSError | SafetensorError, place: Path) -> OSError:
    """The system's error behind one of safetensors, which keeps its number only in the text."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, str(place))
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number), str(place))


def clear_unfinished(folder: Path) -> None:
    """Remove what an interrupted save has left."""
    for left in folder.glob(f"{SAVING}*"):
        shutil.rmtree(left)


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints of a stage, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and STEP_PATTERN.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
