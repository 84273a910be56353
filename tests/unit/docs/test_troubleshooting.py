"""What docs/troubleshooting.md quotes as messages is what the package says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest
from support.launching import REPOSITORY

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
GAP = "…"
QUOTED = [
    code
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if re.fullmatch(r"### (`[^`]+`(, | and )?)+", line)
    for code in re.findall(r"`([^`]+)`", line)
]


def texts(node: ast.AST) -> Iterator[str]:
    """Every text of a program, with gaps for what it fills in; neighbours are one, as Python joins them."""
    for found in ast.walk(node):
        if isinstance(found, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in found.values)
        elif isinstance(found, ast.Constant) and isinstance(found.value, str):
            yield found.value


@cache
def messages() -> str:
    """All of them, by lines."""
    programs = [*sorted((REPOSITORY / "dsmixer").rglob("*.py")), *(REPOSITORY / "launch").glob("*.py")]
    found = {text for program in programs for text in texts(ast.parse(program.read_text(encoding="utf-8")))}
    return "\n".join(sorted(text.replace("\n", " ") for text in found))


def quotes(shown: str) -> re.Pattern[str]:
    """A message of which ``shown`` is a part: its gaps stand for what the program fills in, or leaves out."""
    return re.compile(".*".join(re.escape(piece.strip()) for piece in shown.split(GAP)))


@pytest.mark.parametrize("shown", QUOTED)
def test_the_message_is_one_of_the_package(shown: str) -> None:
    assert any(len(piece.strip()) > 5 for piece in shown.split(GAP)), f"says nothing by itself: {shown}"
    assert quotes(shown).search(messages()), f"nothing in the package says {shown!r}"


def test_a_message_that_nothing_says_is_seen() -> None:
    assert len(QUOTED) > 40
    assert not quotes("the ranks … have gone home").search(messages())
    assert quotes("the … ranks did not come together").search(messages())
