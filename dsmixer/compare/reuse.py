"""Cells that another comparison has finished, taken over instead of made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dsmixer.checkpoint.atomic import make_folder
from dsmixer.compare.plan import Cell, Plan
from dsmixer.compare.state import asked_file, differences_of, method_file, state_of, write_asked
from dsmixer.config.errors import UserError
from dsmixer.config.yaml_text import read_text
from dsmixer.training.run_folder import RunFolder

OWN_PLACE = ("run.name", "run.dir")
"""Keys that may differ in a cell that is taken over: where it lies. Its layout must be the same, for times
and memory are figures too."""


def take_over(plan: Plan, folders: Sequence[Path], say: Callable[[str], None]) -> int:
    """Copy from other comparisons' folders the finished cells that are exactly this one's.

    A cell that is there, begun or done, stays as it is. A variant's cell is the same whatever its variant was
    called there; its experts must be of the same trunk and seed.

    Args:
        plan: what has to be done.
        folders: of the other comparisons.
        say: takes a line for people.

    Returns:
        How many were copied.

    Raises:
        UserError: a folder holds no comparison.
    """
    for folder in folders:
        if not (folder / "comparison.yaml").is_file():
            fix = "give the folder of a comparison, such as runs/table8_losses-small"
            raise UserError("there is no comparison.yaml", where=f"--reuse {folder}", fix=fix)
    copied = 0
    for cell in plan.cells:
        if state_of(plan, cell) != "not begun":
            continue
        same = next((name for folder in folders for name in _same(cell, folder)), None)
        if same is not None:
            _copy(plan, cell, *same)
            say(f"{cell.name}: taken over from {same[0] / same[1]}")
            copied += 1
    return copied


def _same(cell: Cell, folder: Path) -> Iterator[tuple[Path, str]]:
    """The folder, and in it the names of cells that are this one."""
    if cell.kind == "method":
        asked, scores = folder / f"{cell.name}.asked.json", folder / f"{cell.name}.json"
        if asked.is_file() and scores.is_file() and json.loads(read_text(asked, "file")) == cell.raw:
            yield folder, cell.name
        return
    for found in _candidates(cell, folder):
        run = RunFolder(found)
        if run.finished() and run.config.is_file() and not differences_of(cell, run.config, OWN_PLACE):
            yield folder, str(found.relative_to(folder))


def _candidates(cell: Cell, folder: Path) -> Iterable[Path]:
    if cell.kind == "experts":
        return [folder / cell.name]
    return sorted((folder / "cells").glob(f"*/seed-{cell.seed}"))


def _copy(plan: Plan, cell: Cell, folder: Path, name: str) -> None:
    """Copy a cell with its log; under its own name it appears whole or not at all."""
    log, there = plan.log(cell), folder / "logs" / f"{name}.log"
    make_folder(log.parent)
    for suffix in (".log", ".json"):
        if there.with_suffix(suffix).is_file():
            shutil.copyfile(there.with_suffix(suffix), log.with_suffix(suffix))
    if cell.kind == "method":
        make_folder(method_file(plan, cell).parent)
        shutil.copyfile(folder / f"{name}.asked.json", asked_file(plan, cell))
        shutil.copyfile(folder / f"{name}.json", method_file(plan, cell))
        return
    make_folder(cell.folder.parent)
    beside = cell.folder.with_name(f".{cell.folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(folder / name, beside)
    beside.rename(cell.folder)
    write_asked(plan, cell)
