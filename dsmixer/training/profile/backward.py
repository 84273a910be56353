"""The part that each node of a backward pass belongs to: the one whose forward pass made it.

Autograd numbers its nodes in the order in which a thread makes them. The numbers that were given out while a
part was entered are its nodes, so nothing has to be told in the forward pass's own code. Hooks around these
nodes change no gradient; those that are not around a node of the base alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dsmixer.training.profile.clock import Ranges

BASE = "base"


@dataclass
class Origins:
    """Which nodes were made in which part, of one forward pass.

    Attributes:
        leaves: the part of what trains, by the id of the parameter: of its gradient's accumulation.
    """

    leaves: Mapping[int, str]
    _spans: list[tuple[int, int, str]] = field(default_factory=list)
    _thread: int = field(default_factory=threading.get_ident)

    def begin(self) -> int:
        """The number of the next node."""
        return torch.autograd._get_sequence_nr()

    def end(self, begun: int, part: str) -> None:
        """The nodes since ``begun`` are of this part, but for those of parts inside it, which ended before.

        Layers that are run again in the backward pass make no node that this pass comes to.
        """
        ended = torch.autograd._get_sequence_nr()
        if ended > begun and threading.get_ident() == self._thread:
            self._spans.append((begun, ended, part))

    def forget(self) -> None:
        """The backward pass is over."""
        self._spans.clear()

    def watch(self, loss: torch.Tensor, ranges: Ranges) -> list[Any]:
        """Hook the nodes of a loss that are not of the base; the handles of hooks that outlive its graph."""
        parts, first = self._parts(), min((begun for begun, _, _ in self._spans), default=0)
        kept: list[Any] = []
        waiting: list[Any] = [loss.grad_fn]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            if node is None:
                continue
            leaf = getattr(node, "variable", None)
            place = node._sequence_nr() - first
            part = BASE if not 0 <= place < len(parts) else parts[place]
            if leaf is not None:
                part = self.leaves.get(id(leaf), BASE)
            if part != BASE:
                handles = _around(node, part, ranges)
                kept += handles if leaf is not None else ()
            found = {following for following, _ in node.next_functions} - seen
            seen |= found
            waiting += found
        return kept

    def _parts(self) -> list[str]:
        """The part of each node from the first span on; inner spans stand before those around them."""
        if not self._spans:
            return []
        first = min(begun for begun, _, _ in self._spans)
        parts = [BASE] * (max(ended for _, ended, _ in self._spans) - first)
        for begun, ended, part in reversed(self._spans):
            parts[begun - first : ended - first] = [part] * (ended - begun)
        return parts


def _around(node: Any, part: str, ranges: Ranges) -> tuple[Any, Any]:
    """Enter a part before a node and leave it after."""
    depths: list[int] = []

    def before(grads: Any) -> None:
        depths.append(ranges.enter(part, counts=False))

    def after(inputs: Any, grads: Any) -> None:
        ranges.leave(depths.pop())

    return node.register_prehook(before), node.register_hook(after)


def watched(
    backward: Callable[..., Any], origins: Origins, ranges: Ranges, profiling: str
) -> Callable[..., Any]:
    """A backward pass whose nodes are timed; finding them is ``profiling``."""

    def run(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        depth = ranges.enter(profiling)
        handles = origins.watch(loss, ranges)
        ranges.leave(depth)
        try:
            return backward(loss, *args, **kwargs)
        finally:
            origins.forget()
            for handle in handles:
                handle.remove()

    return run
