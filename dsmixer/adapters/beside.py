"""What lies beside an adapter's weights that was trained with it, and is no part of an expert."""

from __future__ import annotations

from pathlib import Path

from dsmixer.adapters.untrusted import read_json_object, regular_size
from dsmixer.config.errors import UserError

PARTS = {
    "non_lora_trainables.bin": "weights that were trained besides the adapter",
    "value_head.bin": "a value head",
    "value_head.safetensors": "a value head",
}
ADDED_TOKENS = "added_tokens.json"


def parts_beside(folder: Path, vocabulary: int | None) -> list[str]:
    """What was trained with an adapter and lies beside its weights, each with the name of its file.

    Args:
        folder: of the adapter.
        vocabulary: tokens that the base embeds; None: not known, and no tokens are told.
    """
    found = [f"{what} ({name})" for name, what in PARTS.items() if _is_there(folder / name)]
    added = _added_beyond(folder / ADDED_TOKENS, vocabulary)
    if added:
        found.append(
            f"{added} token{'s' if added > 1 else ''} that the base has no embedding of ({ADDED_TOKENS})"
        )
    return found


def _is_there(path: Path) -> bool:
    try:
        return regular_size(path) is not None
    except UserError:
        return True


def _added_beyond(path: Path, vocabulary: int | None) -> int:
    """How many tokens have a number that the base does not embed; 0 where the file can't say it."""
    try:
        if vocabulary is None or regular_size(path) is None:
            return 0
        ids = read_json_object(path).values()
    except UserError:
        return 0
    return sum(type(number) is int and number >= vocabulary for number in ids)
