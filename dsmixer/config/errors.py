"""The exceptions that are told in one message: what the user can mend, and what the next start may do."""

from __future__ import annotations

import errno

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (
    *FULL_DISK,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
"""What the system answers to a path that the user has to change; any other answer is a fault of a machine."""


class _Told(Exception):
    """A message of three parts.

    Args:
        problem: what is wrong, with the value that was found.
        where: the file, line and field it was found in, such as ``recipe.yaml:12: stage2.top_k``.
        fix: what to change, as an instruction.
    """

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.problem = problem
        self.where = where
        self.fix = fix
        message = f"{where}: {problem}" if where else problem
        super().__init__(f"{message}\n  Fix: {fix}" if fix else message)


class UserError(_Told, ValueError):
    """A mistake in what the user gave: a recipe, a data file, an adapter, a checkpoint.

    The command line prints it as one message and exits with code 2, without a traceback.
    """


class RefusedError(UserError):
    """The system refuses a file or a folder, for a reason that the user can mend."""


class RunError(_Told, RuntimeError):
    """A run can't go on, and what the user gave is not to blame: the same command may go on later.

    The command line prints it as one message and exits with code 1, without a traceback.
    """


def from_os_error(error: OSError) -> RefusedError | RunError:
    """What it means that the system does not do something with a file or a folder."""
    where = None if error.filename is None else str(error.filename)
    problem = error.strerror or str(error)
    if error.errno not in REFUSED:
        fix = "look at the disk or the file system there, and run the same command again"
        return RunError(problem, where=where, fix=fix)
    fix = "make the folder writable, or set run.dir to another one, and run again"
    if error.errno in FULL_DISK:
        fix = "free some space there, or set run.dir to a folder on another disk, and run again"
    return RefusedError(problem, where=where, fix=fix)


def once_begun(error: OSError | RefusedError) -> RunError:
    """The same of a run that has begun to train: it goes on when the same command is run again."""
    told = error if isinstance(error, RefusedError) else from_os_error(error)
    fix = "make room, or make the folder writable, and run the same command again: it goes on from there"
    return RunError(told.problem, where=told.where, fix=fix)
