"""Arguments that several commands take, and kinds of values."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number above 0, as a type of ``argparse``."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What is scored, and in which pieces; ``evaluate.read_data`` reads it."""
    parser.add_argument(
        "--data",
        action="append",
        metavar="NAME=PATH",
        help="a domain and its held-out file or hub id; repeat for more (default: the test data of the run)",
    )
    parser.add_argument(
        "--max-examples", type=count, help="most examples a domain, drawn with the run's seed"
    )
    parser.add_argument(
        "--max-length", type=count, help="longest row in tokens (default: as in the run, or 1024)"
    )
    parser.add_argument("--batch-size", type=count, help="rows a forward pass (default: as in the run, or 8)")
