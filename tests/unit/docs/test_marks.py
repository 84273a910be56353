"""Marks on blocks: what is read of a page, and that a page which says what is not so fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.doc_blocks import Block, chosen, code_blocks, fill, pages, read_blocks
from support.doc_checks import compare, ended_well
from support.doc_folders import Done

PAGE = """\
# A page

<!-- run: NAME=mine long -->

    dsmixer report runs/NAME \\
        --json

    dsmixer evaluate runs/NAME

Text, and nothing that is run:

    dsmixer generate runs/NAME

<!-- run: exit=2 given=adapters,recipe more='--limit 4' -->

```bash
dsmixer plan
```

<!-- output: part -->

```text
done
```

<!-- file: asked.jsonl -->
```
{"prompt": "a"}
```

<!-- run -->

    $ echo one
    one
"""
PYTHON = """\
<!-- run: python -->

    x = 1

<!-- run: continued given=prompts -->

```python
print(x)
```

<!-- run: long -->

```python
y = 2
```

<!-- run: continued -->

```python
print(y)
```
"""


def blocks_of(text: str, folder: Path) -> list[Block]:
    (folder / "page.md").write_text(text, encoding="utf-8")
    return read_blocks(folder / "page.md")


def test_marked_blocks_are_read_with_their_options_and_placeholders(tmp_path: Path) -> None:
    report, plan, output, file, echo, echoed = blocks_of(PAGE, tmp_path)
    assert report.text == "dsmixer report runs/mine \\\n    --json\n\ndsmixer evaluate runs/mine\n"
    assert report.is_long and report.place == "page.md:3"
    assert (plan.text, plan.codes, plan.given) == ("dsmixer plan --limit 4\n", (2,), ("adapters", "recipe"))
    assert (output.kind, output.text, output.flags) == ("output", "done\n", {"part"})
    assert (file.kind, file.name, file.text) == ("file", "asked.jsonl", '{"prompt": "a"}\n')
    assert (echo.text, echoed.kind, echoed.text) == ("echo one\n", "output", "one\n")


def test_python_that_goes_on_is_one_with_what_it_goes_on_from(
    tmp_path: Path,
) -> None:
    blocks = blocks_of(PYTHON, tmp_path)
    (short,) = chosen(blocks, long=False)
    assert (short.text, short.given, short.is_python) == ("x = 1\nprint(x)\n", ("prompts",), True)
    assert [block.text for block in chosen(blocks, long=True)] == [short.text, "y = 2\nprint(y)\n"]


@pytest.mark.parametrize(
    "text",
    [
        "<!-- run: lnog -->\n\n    true\n",
        "<!-- run -->\n\nNo block.\n",
        "<!--run: long -->\n\n    true\n",
        "<!-- file -->\n\n    a\n",
    ],
)
def test_a_mark_that_is_none_is_told(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("page.md:1: ")):
        blocks_of(text, tmp_path)


def test_placeholders_are_words() -> None:
    assert fill("NAME runs/NAME-half NAMES", {"NAME": "x"}) == "x runs/x-half NAMES"
    assert fill("law.jsonl law", {"law": "totals", "law.jsonl": "a/b"}) == "a/b totals"


def test_every_block_of_a_page_is_seen_with_its_language(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    found = [(language, text.split("\n")[0]) for _, language, text in code_blocks(tmp_path / "page.md")]
    assert found == [
        ("", "dsmixer report runs/NAME \\"),
        ("", "dsmixer generate runs/NAME"),
        ("bash", "dsmixer plan"),
        ("text", "done"),
        ("", '{"prompt": "a"}'),
        ("", "$ echo one"),
    ]


def test_what_a_page_shows_has_to_be_what_is_printed() -> None:
    whole, part = Block("p", "output", "a\nb\n"), Block("p", "output", "a\nc\n", flags=frozenset({"part"}))
    compare(whole, "a  \nb\n\n")
    compare(part, "a\nb\nc\n")
    for block, printed in ((whole, "a\nb\nc\n"), (part, "c\na\n")):
        with pytest.raises(AssertionError):
            compare(block, printed)
    with pytest.raises(AssertionError, match="exit code 1"):
        ended_well(Block("p", "run", "false"), Done(1, "", ""))


def test_the_pages_have_blocks_that_are_run() -> None:
    runs = [block for page in pages() for block in read_blocks(page) if block.kind == "run"]
    assert len(runs) > 25 and sum(not block.is_long for block in runs) > 12
