"""How far a cell has come, by its folder alone."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from dsmixer.checkpoint.atomic import make_folder, write_text
from dsmixer.compare.plan import Cell, Plan
from dsmixer.config.changes import LAYOUT
from dsmixer.config.errors import UserError
from dsmixer.config.from_mixture import DECIDED
from dsmixer.config.recipe import resolved_differences
from dsmixer.config.yaml_text import dump_yaml, read_text
from dsmixer.training.run_folder import RunFolder

State = Literal["not begun", "begun", "done"]
SHOWN = 6

MAY_DIFFER = (
    *(key for key in LAYOUT if key != "evaluation"),
    "evaluation.batch_size",
    *(f"mixer.{key}" for key in (*DECIDED, "experts", "dropout")),
)
"""Keys of a finished cell that may be others now. What is scored decides the figures, so it must be the same;
what a mixture decides comes with ``mixer.mixture``."""
OF_MIXTURE = MAY_DIFFER[-len(DECIDED) - 2 :]


def state_of(plan: Plan, cell: Cell) -> State:
    """Whether a cell is done, or has left something to go on from."""
    if cell.kind == "methods":
        return "done" if methods_file(plan, cell).is_file() else "not begun"
    folder = RunFolder(cell.folder)
    if folder.finished():
        return "done"
    return "begun" if folder.config.is_file() else "not begun"


def methods_file(plan: Plan, cell: Cell) -> Path:
    """The file that other methods' scores are written to."""
    return plan.folder / f"{cell.name}.json"


def asked_file(plan: Plan, cell: Cell) -> Path:
    """The file that says what a cell is: a recipe, or what is asked of other methods."""
    return plan.folder / f"{cell.name}.{'asked.json' if cell.kind == 'methods' else 'yaml'}"


def check_unchanged(plan: Plan) -> None:
    """Refuse a comparison of which a cell that is there was made from other values.

    Raises:
        UserError: names the cell and what differs.
    """
    for cell in plan.cells:
        differences = _differences(plan, cell)
        if differences:
            more = len(differences) - SHOWN
            listed = "; ".join(differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
            own = methods_file(plan, cell) if cell.kind == "methods" else cell.folder
            raise UserError(
                f"{cell.name} was made from other values: {listed}",
                where=str(own),
                fix="give the comparison these values again, or another name (run.name=NAME), or remove what "
                f"is named here, to have it made anew: rm -r {own}",
            )


def _differences(plan: Plan, cell: Cell) -> list[str]:
    if cell.recipe is None:
        return _differences_asked(plan, cell)
    config = RunFolder(cell.folder).config
    if not config.is_file():
        return []
    ignored: Collection[str] = MAY_DIFFER
    if cell.recipe.recipe.mixer.mixture is None:
        ignored = [key for key in MAY_DIFFER if key not in OF_MIXTURE]
    return resolved_differences(read_text(config, "configuration"), cell.recipe.recipe, ignored)


def _differences_asked(plan: Plan, cell: Cell) -> list[str]:
    path = asked_file(plan, cell)
    if not (path.is_file() and methods_file(plan, cell).is_file()):
        return []
    there = json.loads(read_text(path, "file"))
    return [
        f"{key}: {there.get(key)} there, {cell.raw[key]} here"
        for key in cell.raw
        if there.get(key, cell.raw[key]) != cell.raw[key]
    ]


def write_asked(plan: Plan, cell: Cell) -> Path:
    """Write down what a cell is, and where settings of methods are wanted, those; the file."""
    path = asked_file(plan, cell)
    make_folder(path.parent)
    text = json.dumps(cell.raw, indent=1) + "\n" if cell.kind == "methods" else dump_yaml(cell.raw)
    write_text(path, text)
    return path


def settings_file(plan: Plan, cell: Cell) -> Path | None:
    """A file with the settings of a cell's methods, written now; None where they have none."""
    settings: dict[str, Any] = cell.raw["settings"]
    if not settings:
        return None
    path = plan.folder / f"{cell.name}.settings.json"
    make_folder(path.parent)
    write_text(path, json.dumps(settings, indent=1) + "\n")
    return path
