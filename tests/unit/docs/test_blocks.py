"""The blocks of README.md and docs/*.md that are marked to be run do what the pages say (``doc_blocks.py``).

A page's blocks run one after another in a folder of its own, which holds the tree and a small finished run of
the quickstart. Blocks marked ``long`` run with ``DSMIXER_LONG=1`` alone, and so does what goes on from them;
``DSMIXER_DOC_RUN`` names a finished run to take in place of the small one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.doc_blocks import chosen, pages, read_blocks
from support.doc_checks import follow
from support.doc_folders import AbsentError, Workshop

LONG = os.environ.get("DSMIXER_LONG") == "1"
MARKED = {page: blocks for page in pages() if (blocks := read_blocks(page))}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    made = Workshop(tmp_path_factory.mktemp("docs"))
    yield made
    made.close()


@pytest.mark.parametrize("page", MARKED, ids=lambda page: page.name)
def test_the_marked_blocks_of_the_page_run(page: Path, workshop: Workshop) -> None:
    blocks = chosen(MARKED[page], long=LONG)
    if not blocks:
        pytest.skip("long: DSMIXER_LONG=1")
    folder, done = workshop.page(page), None
    for block in blocks:
        if block.kind == "file":
            (folder / block.name).write_text(block.text, encoding="utf-8")
    for block in blocks:
        try:
            done = follow(block, folder, workshop, done)
        except AbsentError as error:
            pytest.skip(f"{block.place} and what is below it: {error}")
