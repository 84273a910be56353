"""``dsmixer COMMAND``: finds the command's file and turns what it raises into a message and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from dsmixer import __version__
from dsmixer.config.errors import UserError

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    from dsmixer.cli import evaluate, generate, report, schema, train

    parser = argparse.ArgumentParser(
        prog="dsmixer", description="Train and run mixtures of LoRA experts on DeepSpeed."
    )
    parser.add_argument("--version", action="version", version=f"dsmixer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (train, evaluate, generate, report, schema):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code of the process."""
    args = build_parser().parse_args(arguments)
    return guarded(lambda: args.run(args))


def guarded(work: Callable[[], int]) -> int:
    """Run a command: 0 done, 2 the user's input is wrong, 1 anything else (with its traceback)."""
    try:
        return work()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same mistake
            print(f"dsmixer: error: {error}", file=sys.stderr, flush=True)
        return WRONG_INPUT
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED
