"""``dsmixer schema``: the JSON schema of a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from dsmixer.config.schema import schema_json


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("schema", help="print the JSON schema of a recipe")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    print(schema_json())
    return 0
