"""Find the checkpoints of a run that are what was saved; all ranks look together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from dsmixer.checkpoint.atomic import flush, make_folder
from dsmixer.checkpoint.publish import clear_unfinished, list_checkpoints
from dsmixer.checkpoint.restore import SavedCheckpoint
from dsmixer.checkpoint.schema import step_of
from dsmixer.checkpoint.verify import (
    DamagedError,
    Entries,
    UnreadableError,
    file_damage,
    read_manifest,
    shared_out,
    unreadable,
)
from dsmixer.config.errors import UserError
from dsmixer.report.run_folder import METRICS_FILE
from dsmixer.training.run_folder import RunFolder
from dsmixer.training.together import stop_together
from dsmixer.training.world import World, gather_objects, once

Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints of a run's stages.

    Every method that is a collective says so, and raises ``UnreadableError`` on all ranks where the system
    refuses one of them to read. A file is read for its checksum once, by one of the ranks.

    Args:
        world: the ranks.
        folder: of the run.
        say: writes a line, once.
    """

    def __init__(self, world: World, folder: RunFolder, say: Callable[[str], None]) -> None:
        self.world, self.folder, self._say = world, folder, say
        self._whole: set[Path] = set()
        self._told: set[Path] = set()

    def damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, naming the file; None where it is what was saved. A collective.

        Raises:
            UserError: another version of dsmixer wrote it.
        """
        if path in self._whole:
            return None
        problem = self._look_at(path)
        if problem is None:
            self._whole.add(path)
        return problem

    def _look_at(self, path: Path) -> str | None:
        entries, problem = self.read_once(lambda: _manifest(path))
        if problem is not None:
            return problem
        own = shared_out(entries, self.world.rank, self.world.size)
        found = self._read(lambda: [file_damage(path / name, entries[name]) for name in own])
        problems = [p for of_rank in gather_objects(self.world, found) for p in of_rank if p is not None]
        return problems[0] if problems else None

    def read_once(self, work: Callable[[], Result]) -> Result:
        """``once``, for what reads the run folder. A collective."""
        result, problem = once(self.world, lambda: self._tried(work))
        self._stop_at(problem)
        return result  # type: ignore[return-value]

    def _read(self, work: Callable[[], Result]) -> Result:
        """Read something on every rank; what this one has found. A collective."""
        result, problem = self._tried(work)
        self._stop_at(*gather_objects(self.world, problem))
        return result  # type: ignore[return-value]

    def _tried(self, work: Callable[[], Result]) -> tuple[Result | None, str | None]:
        """The result, or what could not be read."""
        try:
            return work(), None
        except UnreadableError as error:
            return None, str(error)
        except OSError as error:
            return None, str(unreadable(Path(error.filename or self.folder.path), error))

    def _stop_at(self, *problems: str | None) -> None:
        for problem in problems:
            if problem is not None:
                stop_together(self.world, UnreadableError(problem))

    def listed(self, stage: int) -> list[Path]:
        """Published checkpoints of a stage, whole or not, oldest first. A collective."""
        return self.read_once(lambda: list_checkpoints(self.folder.checkpoints(stage)))

    def newest(self, stage: int) -> Path | None:
        """The newest checkpoint of a stage that is what was saved; None where it has none. A collective.

        Damaged ones are named.

        Raises:
            UserError: it has some, and none is what was saved.
        """
        paths = self.listed(stage)
        problems: list[str] = []
        for path in reversed(paths):
            problem = self.damage(path)
            if problem is None:
                return path
            problems.append(problem)
            if path not in self._told and path != paths[0]:
                self._told.add(path)
                self._say(f"dsmixer: warning: {problem}; going back to the checkpoint before it")
        if problems:
            raise self._none_whole(stage, problems)
        return None

    def _none_whole(self, stage: int, problems: Sequence[str]) -> UserError:
        """From the newest problem to the oldest."""
        folder, many = self.folder.checkpoints(stage), len(problems)
        what = "the only checkpoint is not whole" if many == 1 else f"none of the {many} checkpoints is whole"
        return UserError(
            f"{what}: {problems[0]}. Nothing was moved",
            where=str(folder),
            fix=f"put the files back; or move {folder} away or remove it, to begin stage {stage} anew; or "
            "choose another run.name",
        )

    def open(self, stage: int) -> SavedCheckpoint | None:
        """``newest``, to read from. A collective."""
        path = self.newest(stage)
        return None if path is None else self.open_at(path)

    def open_at(self, path: Path) -> SavedCheckpoint:
        """A checkpoint that is what was saved, to read from. A collective."""
        return self._read(lambda: SavedCheckpoint(path))

    def clear_unfinished(self) -> None:
        """Remove what interrupted saves have left. On rank 0."""
        for stage in (1, 2):
            for name in clear_unfinished(self.folder.checkpoints(stage)):
                self._say(f"an unfinished save of stage {stage} was removed: {name}")

    def after(self, stage: int, step: int) -> list[Path]:
        """Checkpoints of a stage past a step, and all of the stages after it. On rank 0."""
        return [
            path
            for number in range(stage, 3)
            for path in list_checkpoints(self.folder.checkpoints(number))
            if number > stage or step_of(path.name) > step
        ]

    def set_aside(self, paths: Sequence[Path]) -> None:
        """Move checkpoints to where no start finds them and nothing removes them. On rank 0.

        A copy of the metrics goes with them: the rows past the step that the run goes on from will be cut.
        """
        if not paths:
            return
        aside = self._new_folder()
        metrics = self.folder.path / METRICS_FILE
        if metrics.is_file():
            shutil.copy2(metrics, aside / metrics.name)
        # the latest first: one that is left is never newer than one that is gone
        for path in reversed(paths):
            (aside / path.parent.name).mkdir(exist_ok=True)
            path.rename(aside / path.parent.name / path.name)
            # where a power cut would bring it back, it would be taken for the newest
            flush(aside / path.parent.name)
            flush(path.parent)
        names = ", ".join(f"{path.parent.name}/{path.name}" for path in paths)
        self._say(f"moved to {aside}, none was removed: {names}")

    def _new_folder(self) -> Path:
        root = self.folder.path / "checkpoints" / "set-aside"
        number = 1
        while (root / f"{number:03d}").exists():
            number += 1
        make_folder(root / f"{number:03d}")
        return root / f"{number:03d}"


def _manifest(path: Path) -> tuple[Entries, str | None]:
    try:
        return read_manifest(path), None
    except DamagedError as error:
        return {}, str(error)
