"""One example, and the checked fields that every record form is built from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsmixer.config.errors import UserError

MAX_TEXT_CHARACTERS = 10_000_000


@dataclass(frozen=True, slots=True)
class Example:
    """One training or test example of one domain.

    Attributes:
        prompt: what the model is given; no loss on it unless the recipe asks for loss on all tokens.
        completion: what it shall write, with its own leading space as given.
        domain: the domain's name.
        choices: for multiple choice, the candidate completions; the texts scored are ``prompt + choices[i]``.
        answer: index of the right choice.
        location: where it came from: ``FILE:LINE``, ``FILE:row N`` or ``DATASET[SPLIT]:row N``.
        messages: a conversation of ``{"role", "content"}``, ending with the assistant; ``prompt`` and
            ``completion`` are then empty, and the tokenizer's chat template writes them.
    """

    prompt: str
    completion: str
    domain: str
    choices: tuple[str, ...] | None = None
    answer: int | None = None
    location: str = ""
    messages: tuple[dict[str, str], ...] | None = None


def field_error(location: str, field: str, problem: str, fix: str | None = None) -> UserError:
    """The error for one field of one record; its text starts with ``FILE:LINE: FIELD``."""
    return UserError(problem, where=f"{location}: {field}", fix=fix)


def is_given(record: Mapping[str, Any], field: str) -> bool:
    """Whether the record has the field with a value; tables write an absent cell as null or empty text.

    An empty prompt is a value: it says that the completion starts from nothing.
    """
    value = record.get(field)
    return value not in (None, [], {}) and (value != "" or field == "prompt")


def checked_text(value: Any, location: str, field: str) -> str:
    """The value, if it is text that a tokenizer can read.

    Raises:
        UserError: it is not text, is longer than ten million characters, or is not valid Unicode.
    """
    if not isinstance(value, str):
        raise field_error(location, field, f"expected text, found {_described(value)}", "write it as text")
    if len(value) > MAX_TEXT_CHARACTERS:
        problem = f"the text has {len(value):,} characters, more than {MAX_TEXT_CHARACTERS:,}"
        raise field_error(location, field, problem, "split the record")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in set(value)):
        raise field_error(
            location, field, "the text holds half a surrogate pair", "repair the escape \\uD8.."
        )
    return value


def text_field(record: Mapping[str, Any], field: str, location: str, *, allow_empty: bool = False) -> str:
    """A text field that must be there.

    Raises:
        UserError: it is missing, empty where that makes no sense, or not usable text.
    """
    value = record.get(field)
    if value is None:
        raise field_error(location, field, "the field is missing", f"the record has: {_fields(record)}")
    text = checked_text(value, location, field)
    if not text and not allow_empty:
        raise field_error(location, field, "the text is empty", "give it text, or remove the record")
    return text


def list_field(record: Mapping[str, Any], field: str, location: str) -> list[Any]:
    """A list field that must be there; csv and tsv cells hold it as JSON text.

    Raises:
        UserError: it is missing, empty or not a list.
    """
    value = record.get(field)
    if value is None:
        raise field_error(location, field, "the field is missing", f"the record has: {_fields(record)}")
    if isinstance(value, str):
        value = _json_cell(value, location, field)
    if not isinstance(value, list):
        raise field_error(location, field, f"expected a list, found {_described(value)}", "write a list")
    if not value:
        raise field_error(location, field, "the list is empty", "fill it, or remove the record")
    return value


def _json_cell(cell: str, location: str, field: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        problem = f"expected a list written as JSON, found {_described(cell)} ({error})"
        raise field_error(location, field, problem, 'write it as ["…", "…"]') from error


def _described(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '…'}"


def _fields(record: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in list(record)[:20]) or "no fields"
