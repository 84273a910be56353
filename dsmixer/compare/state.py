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
from dsmixer.config.yaml_text import dump_yaml, parse_yaml, read_text
from dsmixer.training.run_folder import RunFolder

State = Literal["not begun", "begun", "done"]
SHOWN = 6

MAY_DIFFER = (
    *(key for key in LAYOUT if key != "evaluation"),
    "evaluation.batch_size",
)
"""Keys of a finished cell that may be others now; what is scored decides the figures, so must be the same."""
OF_MIXTURE = tuple(f"mixer.{key}" for key in (*DECIDED, "experts", "dropout"))
"""Keys that come with ``mixer.mixture``."""
MIXTURE_PARTS = 4  # experts/TRUNK/seed-S/mixture


def state_of(plan: Plan, cell: Cell) -> State:
    """Whether a cell is done, or has left something to go on from."""
    if cell.kind == "method":
        return "done" if method_file(plan, cell).is_file() else "not begun"
    folder = RunFolder(cell.folder)
    if folder.finished():
        return "done"
    return "begun" if folder.config.is_file() else "not begun"


def method_file(plan: Plan, cell: Cell) -> Path:
    """The file that a method's scores are written to."""
    return plan.folder / f"{cell.name}.json"


def asked_file(plan: Plan, cell: Cell) -> Path:
    """The file that says what a cell is: a recipe, or what is asked of a method."""
    return plan.folder / f"{cell.name}.{'asked.json' if cell.kind == 'method' else 'yaml'}"


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
            own = method_file(plan, cell) if cell.kind == "method" else cell.folder
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
    return differences_of(cell, config, MAY_DIFFER) if config.is_file() else []


def differences_of(cell: Cell, config: Path, ignored: Collection[str]) -> list[str]:
    """How a run's ``config.yaml`` differs from a cell's recipe, ``KEY: OLD there, NEW here``.

    Args:
        cell: an experts' or a variant's.
        config: of a run, in this comparison or in another one.
        ignored: keys that may differ, beside those that a mixture decides where the cell starts from one. Of
            mixtures, those from the same experts on the same seed are the same, wherever they lie.
    """
    assert cell.recipe is not None
    text = read_text(config, "configuration")
    ours = cell.recipe.recipe.mixer.mixture
    if ours is None:
        return resolved_differences(text, cell.recipe.recipe, ignored)
    saved = parse_yaml(text, str(config)).value
    theirs = (saved.get("mixer") or {}).get("mixture") if isinstance(saved, dict) else None
    same = theirs is not None and Path(theirs).parts[-MIXTURE_PARTS:] == Path(ours).parts[-MIXTURE_PARTS:]
    more = [*OF_MIXTURE, *(["mixer.mixture"] if same and cell.needs is not None else [])]
    return resolved_differences(text, cell.recipe.recipe, [*ignored, *more])


def _differences_asked(plan: Plan, cell: Cell) -> list[str]:
    path = asked_file(plan, cell)
    if not (path.is_file() and method_file(plan, cell).is_file()):
        return []
    there = json.loads(read_text(path, "file"))
    return [
        f"{key}: {there.get(key)} there, {cell.raw[key]} here"
        for key in cell.raw
        if there.get(key, cell.raw[key]) != cell.raw[key]
    ]


def write_asked(plan: Plan, cell: Cell) -> Path:
    """Write down what a cell is; the file."""
    path = asked_file(plan, cell)
    make_folder(path.parent)
    text = json.dumps(cell.raw, indent=1) + "\n" if cell.kind == "method" else dump_yaml(cell.raw)
    write_text(path, text)
    return path


def settings_file(plan: Plan, cell: Cell) -> Path | None:
    """A file with the settings of a cell's method, written now; None where it has none."""
    settings: dict[str, Any] = cell.raw["settings"]
    if not settings:
        return None
    path = plan.folder / f"{cell.name}.settings.json"
    make_folder(path.parent)
    write_text(path, json.dumps({cell.label: settings}, indent=1) + "\n")
    return path
