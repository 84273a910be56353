"""What goes wrong in a rank outside the training loop: when it comes to a place of the run."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsmixer.training import checkpoints, finish, run, saving
from support.bad_input import fill

PLACES: dict[str, tuple[Any, str]] = {
    "finding": (run, "find_run_folder"),
    "verifying": (checkpoints.Checkpoints, "damage"),
    "reading": (run, "read_inputs"),
    "settling": (run, "write_json"),
    "saving": (saving, "write_parts"),
    "publishing": (finish, "save_mixture"),
    "evaluating": (finish, "evaluate_mixture"),
}
"""A function of the run that a rank calls there, by the name of the place."""
FAULT_BEGINS = "fault at "
SAVED = "saved in "


def tell_fault() -> None:
    """When a fault begins, into the log of the job, on the clock that all processes share."""
    print(f"{FAULT_BEGINS}{time.monotonic()}", file=sys.stderr, flush=True)


def prepare_place(fault: Mapping[str, Any]) -> None:
    """Let this rank run into a fault at a place.

    Args:
        fault: ``place``, one of ``PLACES``; ``time``, from 1, of coming there; and ``does``: ``signal`` with
            ``number``; ``fills`` the disk of the folder ``to``; ``reads`` the file ``to`` in place of the
            first domain's; ``breaks``, the disk does not answer any more; ``dawdles`` for ``seconds``;
            ``mutes``, the log takes nothing any more.
    """
    owner, name = PLACES[fault["place"]]
    whole = getattr(owner, name)
    left = [fault.get("time", 1)]

    def wrapped(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            tell_fault()
            given = DEEDS[fault["does"]](fault, *given)
        return whole(*given, **named)

    setattr(owner, name, wrapped)


def send_signal(fault: Mapping[str, Any], *given: Any) -> tuple[Any, ...]:
    os.kill(os.getpid(), signal.Signals(fault["number"]))
    return given


def fill_disk(fault: Mapping[str, Any], *given: Any) -> tuple[Any, ...]:
    """When the other ranks have written what they had to."""
    time.sleep(1.0)
    fill(Path(fault["to"]))
    return given


def read_other_file(fault: Mapping[str, Any], loaded: Any, *given: Any) -> tuple[Any, ...]:
    recipe = loaded.recipe.model_copy(deep=True)
    object.__setattr__(recipe.data.domains[0], "train", fault["to"])
    return (dataclasses.replace(loaded, recipe=recipe), *given)


def break_disk(fault: Mapping[str, Any], *given: Any) -> tuple[Any, ...]:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(given[0]))


def dawdle(fault: Mapping[str, Any], *given: Any) -> tuple[Any, ...]:
    time.sleep(fault["seconds"])
    return given


def mute_log(fault: Mapping[str, Any], *given: Any) -> tuple[Any, ...]:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, sys.stdout.fileno())
    os.dup2(full, sys.stderr.fileno())
    return given


DEEDS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "signal": send_signal,
    "fills": fill_disk,
    "reads": read_other_file,
    "breaks": break_disk,
    "dawdles": dawdle,
    "mutes": mute_log,
}


def time_saves(module: Any) -> None:
    """Let this rank say how long each save took.

    Args:
        module: that calls ``save_checkpoint``.
    """
    whole = module.save_checkpoint

    def timed(*given: Any, **named: Any) -> Any:
        began = time.monotonic()
        try:
            return whole(*given, **named)
        finally:
            print(f"{SAVED}{time.monotonic() - began}", file=sys.stderr, flush=True)

    module.save_checkpoint = timed
