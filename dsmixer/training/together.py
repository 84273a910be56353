"""How all ranks give up together."""

from __future__ import annotations

from typing import NoReturn

from dsmixer.training.lock import LockLostError, RunLock
from dsmixer.training.telling import tell_problem
from dsmixer.training.world import World, gather_objects, once


def stop_together(world: World, error: Exception) -> NoReturn:
    """Say an error on rank 0 and raise it on every rank; a collective.

    It is said before any rank leaves: the launcher ends the others as soon as one has.

    Raises:
        Exception: the one that is given.
    """
    if world.rank == 0:
        tell_problem(f"error: {error}")
    gather_objects(world, None)
    raise error


def keep_lock(world: World, lock: RunLock | None) -> None:
    """Stop all ranks where rank 0 has lost the lock of the run folder; a collective.

    Args:
        world: the ranks.
        lock: of the run; None: there is none to lose.

    Raises:
        LockLostError: it is another job's, or was removed; rank 0 has said it.
    """
    problem = None if lock is None else once(world, lock.loss)
    if problem is not None:
        stop_together(world, LockLostError(problem))
