"""The life of a checkpoint folder: begun under a hidden name, published by rename, kept for a while."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsmixer.checkpoint.atomic import flush, make_folder, write_json, write_text
from dsmixer.checkpoint.parts import file_entry
from dsmixer.checkpoint.retention import Retention, no_longer_kept
from dsmixer.checkpoint.schema import (
    CONFIG,
    MANIFEST,
    STATE,
    STEP_PATTERN,
    CheckpointState,
    step_name,
    step_of,
)
from dsmixer.checkpoint.verify import manifest_text

SAVING, DROPPING = ".saving-", ".dropping-"
SPARE_BYTES = 2**20
"""Room beside the tensors, for lists and checksums."""


def building_folder(folder: Path, step: int) -> Path:
    """Where a checkpoint is until it is published."""
    return folder / f"{SAVING}{step_name(step)}"


def begin_save(folder: Path, step: int, num_bytes: int) -> None:
    """Clear what an interrupted save has left, look for space, and make the hidden folder.

    Args:
        folder: of the stage, such as ``runs/NAME/checkpoints/stage1``.
        step: optimizer steps done.
        num_bytes: of the tensors, over all ranks.

    Raises:
        OSError: too little space, or no right to write.
    """
    make_folder(folder)
    clear_unfinished(folder)
    check_space(folder, num_bytes + SPARE_BYTES)
    building = building_folder(folder, step)
    if building.exists():  # why it can't be removed
        shutil.rmtree(building)
    building.mkdir()


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises OSError where the disk of ``folder`` has less than ``num_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        problem = f"{os.strerror(errno.ENOSPC)}: {num_bytes:,} bytes are needed and {free:,} are free"
        raise OSError(errno.ENOSPC, problem, str(folder))


def finish_save(
    folder: Path, state: CheckpointState, config: str, entries: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Write state, configuration and, last, the manifest beside the ranks' files, and publish.

    Args:
        folder: of the stage.
        state: of the checkpoint.
        config: the text of its ``config.yaml``.
        entries: of the files that the ranks have written and flushed.

    Raises:
        OSError: it can't be written, or a rank's file is not there as it was written; nothing is published.
    """
    building = building_folder(folder, state.step)
    _check_there(building, entries)
    write_json(building / STATE, state.to_dict())
    write_text(building / CONFIG, config)
    own = {name: file_entry(building / name) for name in (STATE, CONFIG)}
    write_text(building / MANIFEST, manifest_text({**entries, **own}))
    flush(building)
    target = folder / step_name(state.step)
    before = _hide(target) if target.exists() else None  # damaged, or it would have been gone on from
    os.rename(building, target)
    with suppress(OSError):  # it is published; the next save flushes the folder too
        flush(folder)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)
    return target


def _check_there(building: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    for name, entry in entries.items():
        size = (building / name).stat().st_size
        if size != entry["bytes"]:
            problem = f"{size:,} bytes, and {entry['bytes']:,} were written"
            raise OSError(errno.EIO, problem, str(building / name))


def abandon_save(folder: Path, step: int) -> None:
    """Remove what was written of a checkpoint that can't be finished."""
    shutil.rmtree(building_folder(folder, step), ignore_errors=True)


def clear_unfinished(folder: Path) -> list[str]:
    """Remove what an interrupted save has left; the names of the folders that are gone.

    What can't be removed stays: a network file system keeps files that somebody has open. No save needs its
    place but one of the same step.
    """
    left = sorted([*folder.glob(f"{SAVING}*"), *folder.glob(f"{DROPPING}*")])
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in left if not path.exists()]


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints of a stage, oldest first.

    Raises:
        OSError: the folder is there and can't be read: that it has none is then not known.
    """
    try:
        with os.scandir(folder) as entries:
            found = [Path(e.path) for e in entries if STEP_PATTERN.match(e.name) and e.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda path: step_of(path.name))


def drop_old(folder: Path, retention: Retention, loss_of: Mapping[int, float | None]) -> None:
    """Remove the checkpoints of a stage that are no longer to be kept.

    Args:
        folder: of the stage.
        retention: what is kept.
        loss_of: of each checkpoint by its step, None or absent where it is not known.
    """
    steps = {step_of(path.name): path for path in list_checkpoints(folder)}
    for step in no_longer_kept({step: loss_of.get(step) for step in steps}, retention):
        _drop(steps[step])


def _drop(path: Path) -> None:
    """Under a hidden name first: what is half removed is no checkpoint."""
    shutil.rmtree(_hide(path), ignore_errors=True)  # what stays is tried again with each save


def _hide(path: Path) -> Path:
    """Rename a checkpoint to a hidden name that is free."""
    hidden, number = path.with_name(f"{DROPPING}{path.name}"), 1
    while hidden.exists():
        hidden, number = path.with_name(f"{DROPPING}{path.name}-{number}"), number + 1
    os.rename(path, hidden)
    return hidden
