"""What each token adds to a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a letter of several tokens comes whole with its last one."""
    found: list[str] = []
    context, done = 0, 0  # a tokenizer may need some tokens before, to know of a blank
    for end in range(1, len(ids) + 1):
        before = _decoded(tokenizer, ids[context:done])
        after = _decoded(tokenizer, ids[context:end])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            found.append("")
            continue
        found.append(after[len(before) :])
        context, done = done, end
    return found


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
