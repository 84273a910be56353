"""How layers are named, and which of a long list are told, the same in a run's files and in its report."""

from __future__ import annotations

import re

SIDE = re.compile(r"(encoder|decoder)\.")
MAX_SHOWN = 64  # domains, experts or routers on one axis of a heat map


def layer_number(path: str) -> int | None:
    """The number of the layer that a module path leads to: its first part that is a number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def layer_name(path: str) -> str:
    """``layer 3``, with its side in an encoder-decoder model, which has layers of each number on both sides.

    A path outside all layers is its own name.
    """
    number, side = layer_number(path), SIDE.match(path)
    if number is None:
        return path
    return f"{side.group(1)} layer {number}" if side else f"layer {number}"


def short_layer_name(name: str) -> str:
    """A :func:`layer_name` where ``layer`` stands beside it: ``3``, ``encoder 3``."""
    return name.replace("layer ", "", 1)


def evenly(count: int, limit: int = MAX_SHOWN) -> list[int]:
    """``min(count, limit)`` positions spread evenly over ``range(count)``, both ends among them.

    Args:
        count: how many there are.
        limit: at most so many; 2 or more.
    """
    if count <= limit:
        return list(range(count))
    return [round(index * (count - 1) / (limit - 1)) for index in range(limit)]
