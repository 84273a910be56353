"""A JSON file of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsmixer.config.errors import UserError
from dsmixer.config.yaml_text import read_text


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file.

    Raises:
        UserError: it is damaged, or holds something else.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(read_text(path, "file"))
    except json.JSONDecodeError as error:
        fix = "write it again, or remove it to have a report without it"
        raise UserError(f"malformed JSON: {error.msg}", where=f"{path}:{error.lineno}", fix=fix) from None
    if not isinstance(value, dict):
        raise UserError("a JSON object was expected", where=str(path))
    return value
