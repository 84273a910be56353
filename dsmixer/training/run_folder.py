"""The folder of a run: what is in it, whether it may be used, and whether the run is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dsmixer.checkpoint.atomic import write_text
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe

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
    def forms(self) -> Path:
        return self.path / "forms.json"

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

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

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

    Whether a run that is in it is the recipe's own is for ``training.resume`` to say.

    Raises:
        UserError: the folder holds something else, or can't be made.
    """
    run = loaded.recipe.run
    folder = RunFolder(Path(run.dir) / run.name)
    _check_disk(folder.path)
    if folder.config.is_file():
        return folder
    # a start that failed on bad records leaves the list of them, one that was killed its lock; nothing else
    ours = (folder.quarantine, folder.lock)
    if folder.path.is_dir() and any(path not in ours for path in folder.path.iterdir()):
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
        write_text(folder.config, dump_recipe(loaded.recipe))


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


def refuse_other_run(where: Path, differences: Sequence[str]) -> NoReturn:
    """Refuse a recipe that would change the mathematics of the run in its folder.

    Args:
        where: the run's ``config.yaml``, or the checkpoint that was saved under another configuration.
        differences: each with its key.
    """
    more = len(differences) - SHOWN
    listed = "; ".join(differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
    raise UserError(
        f"a run of another configuration is in this folder: {listed}",
        where=str(where),
        fix="choose another run.name, give the recipe the values of the run, or go on with these by "
        "--allow-changes; nothing there was touched",
    )
