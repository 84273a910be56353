"""Whether a marked block of the documentation does what its page says."""

from __future__ import annotations

from pathlib import Path

from support.doc_blocks import Block
from support.doc_folders import Done, Workshop


def follow(block: Block, folder: Path, workshop: Workshop, before: Done | None) -> Done | None:
    """Do what a mark says; how the last block that was run ended."""
    if block.kind == "paths":
        missing = [name for name in first_words(block.text) if not (folder / block.name / name).exists()]
        assert not missing, f"{block.place}: not in {block.name}: {missing}"
        return before
    if block.kind == "file":
        return before
    if block.kind == "run":
        return ended_well(block, workshop.run(block, folder))
    shown_by = ended_well(block, workshop.shell(block.of, folder)) if block.of else before
    assert shown_by is not None, f"{block.place}: no block was run before it"
    compare(block, shown_by.output)
    return shown_by


def ended_well(block: Block, done: Done) -> Done:
    said = f"{done.output[-4000:]}\n{done.problems[-4000:]}"
    assert done.returncode in block.codes, f"{block.place}: exit code {done.returncode}\n{block.text}\n{said}"
    return done


def compare(block: Block, printed: str) -> None:
    """The page shows what was printed, or a part of it in its order."""
    shown = [line.rstrip() for line in block.text.rstrip().splitlines()]
    lines = [line.rstrip() for line in printed.rstrip().splitlines()]
    if "part" not in block.flags:
        assert lines == shown, block.place
        return
    rest = iter(lines)
    for line in shown:
        assert line in rest, f"{block.place}: not printed, or not in this order: {line!r}\n{printed}"


def first_words(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.strip()]
