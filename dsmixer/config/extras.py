"""The extras of the package, which bring optional libraries."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """What a user does to get an extra, as docs/install.md does: without the pins torch would be replaced."""
    command = f"pip install -c constraints.txt --no-build-isolation -e '.[{extra}]'"
    return f"in the folder of constraints.txt: {command} (docs/install.md)"
