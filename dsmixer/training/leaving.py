"""How a rank leaves a run: what it tells the others, so that none waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dsmixer.checkpoint.verify import UnreadableError
from dsmixer.config.errors import FULL_DISK, RefusedError, RunError, UserError, once_begun
from dsmixer.training.health import Stopped
from dsmixer.training.lock import LockLostError
from dsmixer.training.nonfinite import NonFiniteError
from dsmixer.training.pulse import Pulse
from dsmixer.training.saving import SaveError

FAILED, STOPPED = 1, 75
"""Exit codes."""
SAID = (SaveError, NonFiniteError, UnreadableError, LockLostError)
"""What all ranks raise together after rank 0 has said it."""
LONGEST_TEXT = 1000


def way_out(kind: type[BaseException] | None) -> str:
    """``done``, ``stopped``, ``refused``, ``ended`` or ``failed``: see ``judge.Heard.left``.

    Args:
        kind: of the exception that the rank leaves with, None where its work is done.
    """
    if kind is None:
        return "done"
    ways = ((Stopped, "stopped"), (UserError, "refused"), ((*SAID, RunError), "ended"))
    return next((way for kinds, way in ways if issubclass(kind, kinds)), "failed")


def what_it_says(kind: type[BaseException] | None, error: BaseException | None) -> str:
    """The message of an exception on one line; with its kind, where only its traceback says more."""
    if kind is None:
        return ""
    text = str(error).strip()
    if way_out(kind) != "failed":
        return "; ".join(line.strip() for line in text.splitlines())[:LONGEST_TEXT]
    first = text.split("\n")[0]
    return f"{kind.__name__}: {first[:300]}" if first else kind.__name__


@contextmanager
def telling_disks(pulse: Pulse) -> Iterator[None]:
    """What a disk refuses is wrong input while a run is set up; once it has begun, the same command goes on.

    Raises:
        RunError: in place of the ``RefusedError`` of all ranks, or of the ``OSError`` of a full disk on one.
    """
    try:
        yield
    except RefusedError as error:
        if not pulse.begun:
            raise
        raise once_begun(error) from error
    except OSError as error:
        if not pulse.begun or error.errno not in FULL_DISK:
            raise
        raise once_begun(error) from error
