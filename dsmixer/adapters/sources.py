"""Where an adapter comes from: a folder, or a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from dsmixer.adapters.lora_config import CONFIG_FILE
from dsmixer.adapters.untrusted import printable
from dsmixer.adapters.weight_files import PICKLE, SAFETENSORS
from dsmixer.config.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
REVISION = re.compile(r"[\w./-]+")


def adapter_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter; one of the hub is downloaded into the cache of this machine.

    Args:
        source: a folder, or a hub id, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``. A folder that is there beats
            a hub id.
        revision: on the hub, if ``source`` does not name one.

    Returns:
        the folder; of a path that is not there, that path.

    Raises:
        UserError: the hub does not give it.
    """
    text = str(source)
    name, _, named_revision = text.partition("@")
    revision = named_revision or revision
    is_id = HUB_ID.fullmatch(name) and (revision is None or REVISION.fullmatch(revision))
    if isinstance(source, Path) or not is_id or Path(source).is_dir():
        return Path(source)
    folder = _download(name, revision, SAFETENSORS)
    return folder if (folder / SAFETENSORS).is_file() else _download(name, revision, PICKLE)


def _download(name: str, revision: str | None, weights: str) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, weights]))
    except (OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise UserError(
            f"there is no such folder, and the adapter could not be downloaded: {reason}",
            where=f"{name}@{revision}" if revision else name,
            fix="give the folder of an adapter or a hub id, OWNER/NAME or OWNER/NAME@REVISION",
        ) from error


def another_base(named: Any, base: str | None) -> bool:
    """Whether an adapter names another base than it is put on, as far as names of the hub can tell.

    Args:
        named: its ``base_model_name_or_path``.
        base: id or path of the base.
    """
    if not isinstance(named, str) or base is None:
        return False
    both = [name for name in (named, base) if HUB_ID.fullmatch(name) and not Path(name).exists()]
    return len(both) == 2 and named.rpartition("/")[2].lower() != base.rpartition("/")[2].lower()
