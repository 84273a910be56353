"""Files of strangers: only regular ones are opened, JSON is read strictly, text is shown harmlessly."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmixer.config.errors import UserError

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 32
SAVE_AGAIN = "copy the whole adapter again, or save it again with PEFT"


def printable(text: object, limit: int = 200) -> str:
    """Text of a stranger on one line: what a terminal would obey is escaped, and what is long is cut.

    Args:
        text: a string, or a value whose ``repr`` is shown.
        limit: characters shown.
    """
    whole = text if isinstance(text, str) else repr(text)
    cut = whole if len(whole) <= limit else f"{whole[: limit - 3]}..."
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in cut
    )


def shown(path: Path) -> str:
    """A path as it stands in a message."""
    return printable(str(path), 500)


def regular_size(path: Path) -> int | None:
    """The size in bytes of a regular file; a link to one counts, as the hub's cache is made of them.

    Returns:
        None if nothing is there.

    Raises:
        UserError: it is something else: a folder, a pipe, a device, a link to nothing.
    """
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError("is a link to nothing", where=shown(path), fix=SAVE_AGAIN) from None
        return None
    except (OSError, ValueError) as error:
        problem = f"can't be looked at: {printable(str(error))}"
        raise UserError(problem, where=shown(path), fix=SAVE_AGAIN) from error
    if not stat.S_ISREG(about.st_mode):
        raise UserError("is no regular file", where=shown(path), fix=SAVE_AGAIN)
    return about.st_size


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which must be there.

    Raises:
        UserError: it is no JSON (RFC 8259) in UTF-8, no object, names a key twice, or is large or nested
            beyond any sense.
    """
    size = regular_size(path)
    assert size is not None, path
    if size > MAX_JSON_BYTES:
        problem = f"is {size:,} bytes long; a configuration has at most {MAX_JSON_BYTES:,}"
        raise UserError(problem, where=shown(path), fix=SAVE_AGAIN)
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read as JSON: {printable(str(error))}"
        raise UserError(problem, where=shown(path), fix=SAVE_AGAIN) from error
    if not isinstance(value, dict):
        raise UserError("is no JSON object", where=shown(path), fix=SAVE_AGAIN)
    return value


def parse_json(data: bytes) -> Any:
    """JSON, without what other readers of the same text would see differently.

    Raises:
        ValueError: it is not JSON in UTF-8, has NaN or infinity, an integer of thousands of digits, a key
            twice in an object, or is nested deeper than ``MAX_JSON_DEPTH``.
        RecursionError: it is nested so deep that it can't even be parsed.
    """
    value = json.loads(
        data.decode("utf-8"), object_pairs_hook=_without_twins, parse_constant=_refuse_constant
    )
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for parent in level
            for child in (
                parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ()
            )
        ]
    if level:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
