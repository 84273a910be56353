"""The blocks of the documentation that are marked to be run, read from README.md and docs/*.md.

A mark is an HTML comment before a block, fenced or indented; nobody sees it on the page:

    <!-- run -->             the shell or Python block runs and ends with exit code 0; of a block that begins
                             with "$ " such lines are run, and the others are what they print
    <!-- file: NAME -->      the block is what this file holds, before the first block of the page runs
    <!-- output -->          the block is what the block before it prints on its standard output
    <!-- paths: FOLDER -->   the first word of each line is a path in this folder

and has options, separated by spaces, with quotes where they hold spaces themselves:

    python         the indented block is Python; a fenced one says so itself
    long           in the long form alone (DSMIXER_LONG=1)
    continued      Python that goes on where the Python block before it ended, in the same process
    exit=2         the exit code; exit=0,1: one of these
    given=NAME     what the page takes for granted, of ``doc_folders.py``; several: given=ONE,OTHER
    more=TEXT      goes behind the block's last line, such as few steps to train for
    part           of output: these lines are among those printed, in this order
    of=COMMAND     of output: not of the block before it but of this command
    OLD=NEW        what stands here for a placeholder or an example's name, wherever it is a word by itself
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import dedent

from support.launching import REPOSITORY

MARK = re.compile(r"<!-- (run|file|output|paths)(?:: (.*))? -->")
LIKE_A_MARK = re.compile(r"\s*<!--\s*(run|file|output|paths)\b")
FLAGS = ("python", "long", "continued", "part")


@dataclass(frozen=True)
class Block:
    """A marked block.

    Attributes:
        place: page and line of the mark.
        kind: ``run``, ``file``, ``output`` or ``paths``.
        text: the block, placeholders filled.
        name: of a ``file``, the file; of ``paths``, the folder.
        flags: of ``FLAGS``, those that are set.
        codes: exit codes that are right.
        given: names of what the page takes for granted.
        of: the command whose output it is; empty: the block before it.
    """

    place: str
    kind: str
    text: str
    name: str = ""
    flags: frozenset[str] = frozenset()
    codes: tuple[int, ...] = (0,)
    given: tuple[str, ...] = ()
    of: str = ""

    @property
    def is_python(self) -> bool:
        return "python" in self.flags

    @property
    def is_long(self) -> bool:
        return "long" in self.flags


@dataclass
class _Options:
    flags: set[str] = field(default_factory=set)
    named: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    name: str = ""


def pages() -> list[Path]:
    """README.md and the pages of the site, by name."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def read_blocks(page: Path) -> list[Block]:
    """The marked blocks of a page, in their order.

    Raises:
        ValueError: a comment that begins like a mark is none, or has no block.
    """
    lines = page.read_text(encoding="utf-8").split("\n")
    return [
        block
        for number, line in enumerate(lines, start=1)
        if LIKE_A_MARK.match(line)
        for block in _transcript(_block(f"{page.name}:{number}", line.strip(), lines[number:]))
    ]


def _transcript(block: Block) -> list[Block]:
    """The commands of a block with prompts and what they print, or the block itself."""
    if block.kind != "run" or not block.text.startswith("$ "):
        return [block]
    lines = block.text.splitlines(keepends=True)
    commands = "".join(line[2:] for line in lines if line.startswith("$ "))
    printed = "".join(line for line in lines if not line.startswith("$ "))
    return [replace(block, text=commands), Block(block.place, "output", printed)]


def chosen(blocks: Sequence[Block], *, long: bool) -> list[Block]:
    """What is run of a page's blocks: Python that goes on is one with the block before it.

    Args:
        blocks: of a page.
        long: whether long blocks are, and with them what goes on from them.
    """
    found: list[Block] = []
    is_left_out = False
    for block in blocks:
        goes_on = "continued" in block.flags or (block.kind == "output" and not block.of)
        if (block.is_long and not long) or (goes_on and is_left_out):
            is_left_out = is_left_out or block.kind == "run"
        elif "continued" in block.flags:
            place = max(n for n, other in enumerate(found) if other.is_python)
            first = found[place]
            found[place] = replace(first, text=first.text + block.text, given=first.given + block.given)
        else:
            is_left_out = is_left_out and block.kind != "run"
            found.append(block)
    return found


def _block(place: str, mark: str, below: Sequence[str]) -> Block:
    found = MARK.fullmatch(mark)
    language, text = _text(below)
    if found is None or not text:
        raise ValueError(f"{place}: {'there is no block below' if found else 'no mark'}: {mark}")
    kind, options = found[1], _options(place, found[1], found[2] or "")
    if language == "python":
        options.flags.add("python")
    if kind in ("file", "paths") and not options.name:
        raise ValueError(f"{place}: a name has to come first: {mark}")
    if "more" in options.named:
        text = f"{text.rstrip()} {options.named['more']}\n"
    return Block(
        place,
        kind,
        fill(text, options.values),
        options.name,
        frozenset(options.flags),
        tuple(int(code) for code in options.named.get("exit", "0").split(",")),
        tuple(filter(None, options.named.get("given", "").split(","))),
        options.named.get("of", ""),
    )


def _options(place: str, kind: str, text: str) -> _Options:
    options = _Options()
    for word in shlex.split(text):
        key, is_pair, value = word.partition("=")
        if word in FLAGS:
            options.flags.add(word)
        elif not is_pair and kind in ("file", "paths") and not options.name:
            options.name = word
        elif not is_pair:
            raise ValueError(f"{place}: {word} is no option")
        elif key in ("exit", "given", "more", "of"):
            options.named[key] = value
        else:
            options.values[key] = value
    return options


def _text(below: Sequence[str]) -> tuple[str, str]:
    """Language and text of the block that the lines begin with; an empty text: there is none."""
    start = next((n for n, line in enumerate(below) if line.strip()), len(below))
    lines = below[start:]
    fence = re.fullmatch(r"(\s*)(```+)(\w*)", lines[0]) if lines else None
    if fence:
        end = next(n for n, line in enumerate(lines) if n and line.strip() == fence[2])
        return fence[3], dedent("\n".join(lines[1:end]) + "\n")
    return "", dedent("\n".join(_indented(lines)).rstrip() + "\n").lstrip("\n")


def _indented(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        if line.strip() and not line.startswith("    "):
            return
        yield line


def fill(text: str, values: dict[str, str]) -> str:
    """``text`` with values in place of placeholders, which are words: no letter, digit or _ beside them."""
    if not values:
        return text
    longest_first = sorted(values, key=len, reverse=True)
    words = "|".join(map(re.escape, longest_first))
    return re.sub(rf"(?<!\w)(?:{words})(?!\w)", lambda found: values[found[0]], text)


def code_blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Place, language and text of every block of a page, marked or not; an indented one has no language."""
    lines = page.read_text(encoding="utf-8").split("\n")
    number = 0
    while number < len(lines):
        line = lines[number]
        if re.match(r"```+\w*$", line) or (line.startswith("    ") and not lines[number - 1].strip()):
            language, text = _text(lines[number:])
            yield f"{page.name}:{number + 1}", language, text
            number += text.count("\n") + (1 if line.startswith("`") else -1)
        number += 1
