"""The one exception for mistakes that the user can mend."""

from __future__ import annotations

import errno


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a data file, an adapter, a checkpoint.

    The command line prints it as one message and exits with code 2, without a traceback.

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


def from_os_error(error: OSError) -> UserError:
    """What a file or folder that can't be written means to the user."""
    fix = "make the folder writable, or set run.dir to another one, and run again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space there, or set run.dir to a folder on another disk, and run again"
    where = None if error.filename is None else str(error.filename)
    return UserError(error.strerror or str(error), where=where, fix=fix)
