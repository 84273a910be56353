"""A file of requests for ``dsmixer generate --requests``: one JSON object a line, checked before all else."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmixer.config.errors import UserError
from dsmixer.routing.requests import BY_ROUTERS, Request

FIELDS = ("prompt", "expert", "max_new_tokens", "id")
MAX_NEW_TOKENS = 1_000_000


@dataclass(frozen=True)
class FileRequest:
    """One line of the file.

    Attributes:
        prompt: text.
        to: an expert's name, None for the base, ``BY_ROUTERS`` where the line names none.
        max_new_tokens: longest answer; None: as the command says.
        id: given back with the answer; None where the line has none.
        location: ``FILE:LINE``.
    """

    prompt: str
    to: Request
    max_new_tokens: int | None
    id: str | int | None
    location: str

    @property
    def method(self) -> str:
        """``base``, ``expert:NAME`` or ``mixture``."""
        return method_of(self.to)


def method_of(to: Request) -> str:
    """How results name the way of a request."""
    if to is BY_ROUTERS:
        return "mixture"
    return "base" if to is None else f"expert:{to}"


def read_requests(path: Path, experts: Sequence[str]) -> list[FileRequest]:
    """All requests of a file.

    Args:
        path: JSONL; each line ``{"prompt": …}`` and, where wanted, ``expert`` (a name, or null for the base;
            absent: by the routers), ``max_new_tokens`` and ``id``.
        experts: the mixture's.

    Raises:
        UserError: with file, line and field, at the first that is wrong; or there are none.
    """
    from dsmixer.data.formats import jsonl_rows

    if not path.is_file():
        raise UserError("no such file", where=str(path), fix="give a file of requests to --requests")
    found = []
    for row, location in jsonl_rows(path):
        if isinstance(row, UserError):
            raise UserError(row.problem, where=row.where, fix='write {"prompt": …} on each line')
        found.append(_request(row, location, experts))
    if not found:
        raise UserError("no requests in the file", where=str(path), fix='write {"prompt": …} on each line')
    return found


def _request(row: Mapping[str, Any], location: str, experts: Sequence[str]) -> FileRequest:
    from dsmixer.data.records import field_error, text_field

    for field in row:
        if field not in FIELDS:
            near = difflib.get_close_matches(field, FIELDS, 1)
            raise field_error(
                location, field, "unknown field", f"use {near[0] if near else ', '.join(FIELDS)}"
            )
    to = row.get("expert", BY_ROUTERS)
    if isinstance(to, str) and to not in experts:
        raise field_error(
            location, "expert", f"no expert is called {to!r}", f"choose from {', '.join(experts)}"
        )
    if not (isinstance(to, str) or to is None or to is BY_ROUTERS):
        fix = "write an expert's name or null, or leave it out"
        raise field_error(location, "expert", f"{to!r} is no name", fix)
    limit = row.get("max_new_tokens")
    if limit is not None and not (type(limit) is int and 0 < limit <= MAX_NEW_TOKENS):
        fix = f"write a whole number from 1 to {MAX_NEW_TOKENS:,}, or leave it out"
        raise field_error(location, "max_new_tokens", f"{limit!r} is no number of tokens", fix)
    key = row.get("id")
    if not (key is None or isinstance(key, str) or type(key) is int):
        raise field_error(location, "id", f"{key!r} is neither text nor a whole number", "write one of these")
    return FileRequest(text_field(row, "prompt", location), to, limit, key, location)
