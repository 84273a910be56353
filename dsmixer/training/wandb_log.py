"""Weights & Biases: the figures of ``metrics.jsonl`` once more, for runs whose recipe names a project."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dsmixer.config.errors import UserError
from dsmixer.config.extras import how_to_install
from dsmixer.config.recipe import LoadedRecipe
from dsmixer.training.metrics import scalars
from dsmixer.training.telling import tell_problem

if TYPE_CHECKING:
    from wandb import Run

UPLOAD_SECONDS = 60  # that the end of a stage waits for rows to go out; they stay in the run folder
LOGIN_SECONDS = 1  # that a prompt stands: a run asks for no key


class WandbLog:
    """The rows of one stage as a run of Weights & Biases.

    Each stage is a run of its own in a group named after the run, because steps count from 1 in each. A run
    that is resumed takes up the same two. Neither the recipe nor anything about machine, commands, code or
    output is sent. What can't be sent is told, and ends no run. Only rank 0 opens one.

    Args:
        run_folder: ``runs/NAME``; ``wandb/`` in it holds what is sent, and the identity that a resumed run
            takes up again.
        project: that the runs belong to; whose, and whether they are sent at all, is said by the
            environment (``WANDB_ENTITY``, ``WANDB_MODE``).
        name: of the run.
        stage: 1 or 2.
    """

    def __init__(self, run_folder: Path, *, project: str, name: str, stage: int) -> None:
        import wandb  # slow to import, and only rank 0 needs it

        self._stage = stage
        self._run: Run | None = None
        self._errors = (wandb.Error, OSError)
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            finish_timeout=UPLOAD_SECONDS,
            login_timeout=LOGIN_SECONDS,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        try:
            self._run = wandb.init(
                project=project,
                name=f"{name} stage {stage}",
                group=name,
                id=f"{_identity(run_folder)}-stage{stage}",
                resume="allow",
                dir=run_folder,
                settings=settings,
            )
        except self._errors as error:
            self._give_up(error)

    def write(self, step: int, row: Mapping[str, object]) -> None:
        """One logged step.

        Args:
            step: from 1.
            row: of ``metrics.jsonl``; what is not a finite number is left out.
        """
        if self._run is None:
            return
        try:
            self._run.log(scalars(self._stage, row), step=step)
        except self._errors as error:
            self._give_up(error)

    def close(self) -> None:
        """Send what is waiting."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish()
        except self._errors as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        tell_problem(f"warning: nothing more of stage {self._stage} goes to Weights & Biases: {error}")
        self._run = None


def check_wandb(loaded: LoadedRecipe) -> None:
    """Refuse a project where the package is not installed.

    Raises:
        UserError: it is not.
    """
    if loaded.recipe.run.wandb is not None and importlib.util.find_spec("wandb") is None:
        problem = "metrics go to Weights & Biases by its package, which is not installed"
        raise UserError(problem, where=loaded.where("run.wandb"), fix=how_to_install("wandb"))


def _identity(run_folder: Path) -> str:
    """The same for a run that is gone on with, and another for one of the same name elsewhere."""
    path = run_folder / "wandb" / "identity"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
