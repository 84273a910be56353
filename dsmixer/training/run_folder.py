"""The folder of a run: what is in it, whether it may be used, and whether the run is done."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe, resolved_differences

SHOWN = 8
LEAST_FREE_BYTES = 2**20


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def mixture(self) -> Path:
        return self.path / "mixture"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def routing(self) -> Path:
        return self.path / "routing.json"

    @property
    def report(self) -> Path:
        return self.path / "report" / "index.html"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.jsonl"

    def checkpoints(self, stage: int) -> Path:
        return self.path / "checkpoints" / f"stage{stage}"

    @property
    def finished_mark(self) -> Path:
        return self.path / ".finished"

    def finished(self) -> bool:
        """Whether the run itself has written its last file; a report alone can be made at any time."""
        return self.finished_mark.is_file()


def find_run_folder(loaded: LoadedRecipe) -> RunFolder:
    """The run folder of a recipe, if the recipe may use it; nothing is written.

    Raises:
        UserError: the folder holds something else, or a run of another configuration, or can't be made.
    """
    run = loaded.recipe.run
    folder = RunFolder(Path(run.dir) / run.name)
    _check_disk(folder.path)
    if folder.config.is_file():
        differences = resolved_differences(folder.config.read_text(encoding="utf-8"), loaded.recipe)
        if differences:
            _refuse_other_run(folder, differences)
        return folder
    # a start that failed on bad records leaves the list of them, and nothing else
    if folder.path.is_dir() and any(path != folder.quarantine for path in folder.path.iterdir()):
        raise UserError(
            "this folder is not empty and holds no run (there is no config.yaml)",
            where=str(folder.path),
            fix="choose another run.name or run.dir; nothing there was touched",
        )
    return folder


def claim_run_folder(loaded: LoadedRecipe) -> None:
    """Make the run folder with the configuration in it, unless the run is in it already.

    Called once everything that the recipe names has been found good: a recipe that a failed start has not
    written down can still be mended. Rank 0 alone calls this.

    Raises:
        UserError: as :func:`find_run_folder`.
        OSError: it can't be written.
    """
    folder = find_run_folder(loaded)
    if not folder.config.is_file():
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.config, dump_recipe(loaded.recipe))


def _check_disk(path: Path) -> None:
    """Refuse a folder that is a file, or lies in one, or that nothing can be written to."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        fix = "choose another run.name or run.dir; the file was not touched"
        raise UserError("this is a file, not a folder", where=str(there), fix=fix)
    if not os.access(there, os.W_OK | os.X_OK):
        fix = "set run.dir to a folder of your own"
        raise UserError("this folder can't be written to", where=str(there), fix=fix)
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE_BYTES:
        fix = "free some space there, or set run.dir to a folder on another disk"
        raise UserError(f"no space left for a run: {free:,} bytes are free", where=str(there), fix=fix)


def _refuse_other_run(folder: RunFolder, differences: list[str]) -> None:
    more = len(differences) - SHOWN
    listed = "; ".join(differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
    raise UserError(
        f"a run of another configuration is in this folder: {listed}",
        where=str(folder.config),
        fix="choose another run.name, or give the recipe the values of the run; nothing there was touched",
    )


def write_atomically(path: Path, text: str) -> None:
    """The whole text or the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.part")
    try:
        with building.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        building.unlink(missing_ok=True)
        raise
    os.replace(building, path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
