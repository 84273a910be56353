"""Where an adapter comes from: a folder, or a repository of the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from dsmixer.adapters.lora_config import CONFIG_FILE
from dsmixer.adapters.untrusted import printable
from dsmixer.adapters.weight_files import PICKLE, SAFETENSORS
from dsmixer.config.errors import UserError

NOT_SERVED = (OSError, ValueError, HTTPError, RuntimeError, TypeError, LookupError, AttributeError)
"""What the hub's library raises: its own, of a transport that broke off, on answers that make no sense."""
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
        UserError: it is no path or id, or the hub does not give it.
    """
    if not isinstance(source, str | Path) or not str(source).strip():
        problem = f"{printable(repr(source), 60)} is no source of an adapter"
        raise UserError(problem, fix="give the folder of an adapter or a hub id, OWNER/NAME")
    text = str(source)
    if text.startswith("~"):
        return Path(os.path.expanduser(text))
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
    except NOT_SERVED as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise UserError(
            f"there is no such folder, and the adapter could not be downloaded: {reason}",
            where=f"{name}@{revision}" if revision else name,
            fix="give the folder of an adapter or a hub id, OWNER/NAME or OWNER/NAME@REVISION",
        ) from error


def another_base(named: Any, base: str | None, *more: Any) -> bool:
    """Whether an adapter names another base than it is put on.

    The last parts of the names are compared, whatever the case: a copy of a model may have another owner, or
    be a folder.

    Args:
        named: its ``base_model_name_or_path``.
        base: id or path of the base.
        more: other names that the base has, such as ``_name_or_path`` of its configuration.
    """
    ours = {_last_part(name) for name in (base, *more)} - {""}
    theirs = _last_part(named)
    return bool(theirs and ours) and theirs not in ours


def _last_part(name: Any) -> str:
    """``some-model`` of ``someone/Some-Model``, ``/models/some-model/`` and a snapshot of the hub's cache."""
    parts = [part for part in re.split(r"[/\\]", name.lower()) if part] if isinstance(name, str) else []
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rpartition("--")[2]
    return parts[-1] if parts else ""
