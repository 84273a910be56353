"""From what a recipe names (a file, a folder, a hub id) to records, each with its place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsmixer.config.checks import HUB_ID
from dsmixer.config.errors import UserError
from dsmixer.data.formats import FORMATS, Row, known_suffix, rows_of_file

MAX_FILES = 10_000
PATH_LIKE = re.compile(r"[./~].*|.*\.[A-Za-z][A-Za-z0-9]*|.*[\\].*|.*/.*/.*")
SPLIT_NAMED = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![A-Za-z])", re.IGNORECASE)
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")


def read_records(
    source: str, *, split: str = "train", subset: str | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of a file, a folder of files or a Hugging Face data set.

    Args:
        source: a .jsonl, .jsonl.gz, .json, .csv, .tsv or .parquet file; a folder of such files, read in
            sorted order; or a hub id ``OWNER/NAME``, or ``OWNER/NAME@REVISION`` (a branch, tag or commit).
        split: the split of a hub data set, or of a folder whose files are named after splits.
        subset: the configuration of a hub data set.

    Yields:
        A record and its location, ``FILE:LINE``, ``FILE:row N`` (parquet) or ``DATASET[SPLIT]:row N``.

    Raises:
        UserError: the source does not exist or cannot be read, or a record is malformed.
    """
    for row, location in read_rows(source, split=split, subset=subset):
        if isinstance(row, UserError):
            raise row
        yield row, location


def read_rows(source: str, *, split: str = "train", subset: str | None = None) -> Iterator[tuple[Row, str]]:
    """As ``read_records``, but a row that alone is malformed comes as its ``UserError``."""
    path = Path(source).expanduser()
    if path.is_dir():
        for file in _files_of_folder(path, split):
            yield from rows_of_file(file)
    elif path.exists():
        yield from rows_of_file(path)
    elif is_on_hub(source):
        for number, record in enumerate(_hub_table(source, split, subset), 1):
            yield dict(record), f"{source}[{split}]:row {number}"
    elif PATH_LIKE.fullmatch(source.partition("@")[0]):
        raise UserError("no such file", where=source, fix="correct the path in the recipe")
    else:
        raise UserError("no such file", where=source, fix="a path, or a hub id such as OWNER/NAME")


def is_on_hub(source: str) -> bool:
    """Whether a source is taken for a data set of the hub: it has the form of a hub id, and is not here."""
    if Path(source).expanduser().exists() or PATH_LIKE.fullmatch(source.partition("@")[0]):
        return False
    return HUB_ID.fullmatch(source) is not None


def fetch_source(source: str, *, split: str = "train", subset: str | None = None) -> None:
    """Bring a data set of the hub into the cache of this machine; nothing for files and folders.

    Raises:
        UserError: it can't be had.
    """
    if is_on_hub(source):
        _hub_table(source, split, subset)


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    """The folder's data files in sorted order; only the split's, where their names tell splits apart."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name[0] != ".")
    if any(name in SAVED_DATASET_FILES for name in names):
        raise UserError(
            "a data set written by save_to_disk", where=str(folder), fix="write it with to_parquet"
        )
    files = [folder / name for name in names if known_suffix(Path(name))]
    if not files:
        raise UserError("no data file in the folder", where=str(folder), fix=f"one of {', '.join(FORMATS)}")
    if any(SPLIT_NAMED.match(file.name) for file in files):
        wanted = re.compile(re.escape(split) + r"(?![A-Za-z])", re.IGNORECASE)
        found = ", ".join(file.name for file in files[:10])
        files = [file for file in files if wanted.match(file.name)]
        if not files:
            raise UserError(
                f"no file of split {split!r}, only {found}", where=str(folder), fix="name the split"
            )
    if len(files) > MAX_FILES:
        problem = f"{len(files):,} files, more than {MAX_FILES:,}"
        raise UserError(problem, where=str(folder), fix="join them into fewer files")
    return files


def _hub_table(source: str, split: str, subset: str | None) -> Iterable[dict[str, Any]]:
    # Loading these takes a second, which local files need not pay.
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = source.partition("@")
    try:
        table: Iterable[dict[str, Any]] = datasets.load_dataset(
            name, name=subset, split=split, revision=revision or None
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        problem = (
            f"neither a file here nor a data set that could be loaded ({type(error).__name__}: {reason})"
        )
        fix = "correct the path or hub id, its split and subset; log in if it is private"
        raise UserError(problem, where=source, fix=fix) from error
    return table
