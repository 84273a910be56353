"""``dsmixer COMMAND``: finds the command's file and turns what it raises into a message and an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from dsmixer import __version__
from dsmixer.config.errors import FULL_DISK, RunError, UserError, from_os_error
from dsmixer.training.telling import let_go, tell_problem

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75
PATIENCE = 30
"""Seconds that a rank leaves to its node's first, which as a rule has found the same mistake and says so."""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    from dsmixer.cli import (
        compare,
        doctor,
        evaluate,
        export,
        generate,
        import_adapters,
        plan,
        pool,
        prune,
        report,
        schema,
        train,
    )

    parser = argparse.ArgumentParser(
        prog="dsmixer", description="Train and run mixtures of LoRA experts on DeepSpeed."
    )
    parser.add_argument("--version", action="version", version=f"dsmixer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        train,
        plan,
        evaluate,
        compare,
        generate,
        import_adapters,
        pool,
        prune,
        export,
        report,
        doctor,
        schema,
    ):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code of the process."""
    args = build_parser().parse_args(arguments)
    return guarded(lambda: args.run(args))


def guarded(work: Callable[[], int]) -> int:
    """Run a command: 0 done, 2 the user's input is wrong, 1 anything else, told or with its traceback."""
    try:
        return work()
    except UserError as error:
        return _told(error, WRONG_INPUT)
    except RunError as error:
        return _told(error, FAILED)
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        return _told(from_os_error(error), WRONG_INPUT)
    finally:
        let_go(sys.stderr)


def _told(error: Exception, code: int) -> int:
    """Say what is wrong, once a node: every rank finds the same, and the launcher ends the others."""
    rank, alone = os.environ.get("RANK", "0"), ""
    if os.environ.get("LOCAL_RANK", rank) != "0":
        # a node's launcher ends its ranks as soon as one has left: the first must not be cut off before it
        # has spoken
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        if signal.sigtimedwait({signal.SIGTERM}, PATIENCE) is not None:
            return code
        alone = f"rank {rank} alone: dsmixer: "
    tell_problem(f"{alone}error: {error}")
    return code
