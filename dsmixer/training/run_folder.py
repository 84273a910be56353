"""The folder of a run: what is in it, whether it may be used, and whether the run is done."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe, resolved_differences

SHOWN = 8


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

    def finished(self) -> bool:
        """The report is written last."""
        return self.report.is_file()


def claim_run_folder(loaded: LoadedRecipe) -> RunFolder:
    """Make the run folder, or take up the run that is in it; rank 0 alone calls this.

    Raises:
        UserError: the folder holds something else, or a run of another configuration.
        OSError: it can't be written.
    """
    run = loaded.recipe.run
    folder = RunFolder(Path(run.dir) / run.name)
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError("this is a file, not a folder", where=str(folder.path), fix="choose another run.name")
    if folder.config.is_file():
        differences = resolved_differences(folder.config.read_text(encoding="utf-8"), loaded.recipe)
        if differences:
            _refuse_other_run(folder, differences)
        return folder
    if folder.path.is_dir() and any(folder.path.iterdir()):
        raise UserError(
            "this folder is not empty and holds no run (there is no config.yaml)",
            where=str(folder.path),
            fix="choose another run.name or run.dir; nothing there was touched",
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.config, dump_recipe(loaded.recipe))
    return folder


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
