"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dsmixer.checkpoint.atomic import flush, flush_tree
from dsmixer.config.errors import RefusedError, UserError


@contextmanager
def published(folder: Path, *, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """Write into a sibling of ``folder``, which takes its name at the end.

    One process writes a folder at a time. After a kill the old content is whole, under its own name or, in
    the instant between two renames, as ``.NAME.previous``.

    Args:
        folder: the final name.
        may_replace: whether what is there under this name already may go.

    Raises:
        UserError: something else is there.
        RefusedError: the disk refuses the writing.
    """
    folder = Path(os.path.abspath(folder))  # "." has no name to write beside
    check_free(folder, may_replace=may_replace)
    part = folder.with_name(f".{folder.name}.part")
    previous = folder.with_name(f".{folder.name}.previous")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        flush_tree(part)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        part.rename(folder)
        flush(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        fix = "free space, or choose another folder"
        raise RefusedError(f"cannot be written: {error}", where=str(folder), fix=fix) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_free(folder: Path, *, may_replace: Callable[[Path], bool] = lambda _: False) -> None:
    """Refuse to write a folder where something else is, before there is anything to write.

    Raises:
        UserError: names the folder.
    """
    if folder.is_symlink():
        raise UserError("it is a link", where=str(folder), fix="give the folder that it points to")
    if folder.exists() and not _is_free(folder) and not may_replace(folder):
        raise UserError("something else is there already", where=str(folder), fix="choose another folder")


def _is_free(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
