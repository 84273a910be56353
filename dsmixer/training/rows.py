"""The rows of experts in DeepSpeed's flat partitions, and those of them that a step reached.

A unit is what is clipped and counted together: each expert, over all its projections, and all routers as
one. U units: E experts, then the routers. Where only some rows of the routers train, the others are of a unit
more, which no step reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from dsmixer.placement.layout import ExpertLayout
from dsmixer.placement.pieces import Piece, is_bank

FEW_RUNS = 5
"""Fewer runs of rows than this are taken one after the other on a device; on the CPU, where no kernel has to
be launched, all are."""


@dataclass(frozen=True)
class Span:
    """Rows of one parameter in a shard: ``count`` rows of ``width`` elements, one unit each.

    The routers' span has one row. A partition may start or end inside an expert: that part is a row of
    its own, and ``inside`` says where in the expert it starts; other rows are whole.
    """

    start: int
    count: int
    width: int
    units: tuple[int, ...]
    inside: int = 0

    def of(self, flat: torch.Tensor, begins: int = 0) -> torch.Tensor:
        """The rows ``[count, width]`` in a tensor that begins at that element of the shard."""
        start = self.start - begins
        return flat[start : start + self.count * self.width].view(self.count, self.width)


@dataclass(frozen=True)
class Rows:
    """The N rows of a span that a step reached, and their units.

    Rows that follow each other are taken as a view; others are copied out, and back in.

    Attributes:
        places, units: on the device of the span.
        listed: the places, on the host.
    """

    places: slice | torch.Tensor
    units: slice | torch.Tensor
    listed: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.listed)

    def of(self, span: torch.Tensor) -> torch.Tensor:
        """``[..., count, width]`` to ``[..., N, width]``."""
        if isinstance(self.places, slice):
            return span[..., self.places, :]
        here = self.places.device == span.device  # theta(0) may be on the host
        return span.index_select(-2, self.places if here else torch.tensor(self.listed))

    def put(self, span: torch.Tensor, rows: torch.Tensor) -> None:
        """Write back what ``of`` copied out."""
        if isinstance(self.places, torch.Tensor):
            span.index_copy_(-2, self.places, rows)

    def set(self, span: torch.Tensor, rows: torch.Tensor) -> None:
        """Write rows, whether they were copied out or not."""
        if isinstance(self.places, torch.Tensor):
            span.index_copy_(-2, self.places, rows)
        else:
            span[..., self.places, :] = rows

    def add_units(self, values_U: torch.Tensor, values_N: torch.Tensor) -> None:
        """Add a value of each row to that of its unit."""
        if isinstance(self.units, torch.Tensor):
            values_U.index_add_(0, self.units, values_N)
        else:
            values_U[self.units].add_(values_N)


@dataclass(frozen=True)
class Reached:
    """The rows that a step reached, together, and their runs where those can be taken one by one."""

    rows: Rows
    parts: tuple[Rows, ...]


def reached_rows(units_X: torch.Tensor, reached_U: torch.Tensor, device: torch.device) -> Reached | None:
    """Which rows of a span of these units a step reached; None where it reached none."""
    resting = reached_U.new_zeros(1)
    places_N = torch.cat((reached_U, resting))[units_X].nonzero().flatten()
    if not len(places_N):
        return None

    def rows(places: torch.Tensor) -> Rows:
        indices = _run_or_index(places, device), _run_or_index(units_X[places], device)
        return Rows(*indices, tuple(places.tolist()))

    together = rows(places_N)
    cuts = (places_N.diff() != 1).nonzero().flatten() + 1
    alone = len(cuts) > 0 and (device.type == "cpu" or len(cuts) < FEW_RUNS)
    return Reached(together, tuple(map(rows, places_N.tensor_split(cuts))) if alone else (together,))


def _run_or_index(indices: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    """A slice where the indices follow each other, else the indices on the device."""
    first = int(indices[0])
    if torch.equal(indices, torch.arange(first, first + len(indices))):
        return slice(first, first + len(indices))
    return to_device(indices, device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, for which the host does not wait."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def spans_of(piece: Piece, layout: ExpertLayout, router_rows: Sequence[int] | None = None) -> list[Span]:
    """Cut a piece of a bank ``[e, ...]`` at its experts; a router ``[E, D]`` is one row of the last unit.

    Args:
        piece: of a parameter.
        layout: of the experts.
        router_rows: the rows of routers that train, by expert; None: all. A router is then cut at its rows,
            and the others rest.
    """
    if not is_bank(piece.name):
        if router_rows is None:
            return [Span(piece.flat_start, 1, piece.numel, (layout.num_experts,))]
        return _router_spans(piece, layout, frozenset(router_rows))
    width = math.prod(piece.shape[1:])
    spans, position, left = [], piece.param_start, piece.numel
    start = piece.flat_start
    while left:
        place, inside = divmod(position, width)
        count, length = (1, min(width - inside, left)) if inside or left < width else (left // width, width)
        spans.append(Span(start, count, length, layout.local[place : place + count], inside))
        start, position, left = start + count * length, position + count * length, left - count * length
    return spans


def _router_spans(piece: Piece, layout: ExpertLayout, trained: frozenset[int]) -> list[Span]:
    """A piece of a router ``[E, D]`` cut at its rows; those that do not train are of the resting unit."""
    width = math.prod(piece.shape[1:])
    spans, done = [], 0
    while done < piece.numel:
        expert, inside = divmod(piece.param_start + done, width)
        numel = min(width - inside, piece.numel - done)
        unit = layout.num_experts + (expert not in trained)
        spans.append(Span(piece.flat_start + done, 1, numel, (unit,)))
        done += numel
    return spans


@dataclass(frozen=True)
class Stack:
    """Spans of the same units and width that follow each other in a shard: they are updated together."""

    span: Span
    repeats: int

    @property
    def end(self) -> int:
        return self.span.start + self.repeats * self.span.count * self.span.width

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.repeats, self.span.count, self.span.width

    def goes_on(self, span: Span) -> bool:
        """Whether a span is one more of the same kind, right behind."""
        return span == replace(self.span, start=self.end)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """``[repeats, count, width]``."""
        return flat[self.span.start : self.end].view(self.repeats, self.span.count, self.span.width)


def stacked(spans: Iterable[Span]) -> list[Stack]:
    stacks: list[Stack] = []
    for span in spans:
        last = stacks[-1] if stacks else None
        if last is not None and last.goes_on(span):
            stacks[-1] = Stack(last.span, last.repeats + 1)
        else:
            stacks.append(Stack(span, 1))
    return stacks
