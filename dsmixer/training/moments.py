"""Where Adam's two moments are kept: in float32, or in 8 bits with one scale a block, also in paged memory.

The 8-bit form is the dynamic data type of "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861),
as bitsandbytes has it, in blocks of 256 numbers that are counted from the start of an expert's weights on a
projection: so experts stay apart, one that a step did not reach is left as it is, bit for bit, and another
layout has the same blocks, but for those that a cut between two ranks goes through. The signed type gets a
-1 beside its 1: the largest number of a block is then kept as it is, so that numbers once rounded do not
change when they are written to a checkpoint in float32 and read again. Routers, which are small, stay in
float32.

Shapes: X repeats of a stack, N or ``count`` rows, ``width`` elements a row, J blocks a row.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from dsmixer.placement.pieces import Shard
from dsmixer.training.rows import Rows, Stack

KINDS = ("exp_avg", "exp_avg_sq")
BLOCK = 256
SMALLEST = torch.finfo(torch.float32).tiny
"""Blocks whose largest number is smaller are zero."""

Precision = Literal["float32", "8bit"]


@dataclass(frozen=True)
class Keep:
    """How moments are kept: ``precision`` of the experts', and whether in memory of the device that the
    driver moves to the host when there is too little (``paged``, CUDA alone)."""

    precision: Precision = "float32"
    paged: bool = False


class Float32Moment:
    """Kept as it is.

    Attributes:
        values: ``[X, count, width]``, updated in place.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def row(self, repeat: int, number: int) -> torch.Tensor:
        """One row in float32, ``[width]``."""
        return self.values[repeat, number]

    def fill(self, values: torch.Tensor) -> None:
        """Replace all of it, by ``[X, count, width]`` float32 on any device."""
        if values.data_ptr() != self.values.data_ptr():
            self.values.copy_(values)

    def kept(self) -> Sequence[torch.Tensor]:
        """The tensors that it is."""
        return (self.values,)


class EightBitMoment:
    """Kept as places in a table of 256 numbers between -1 and 1, and the largest size in each block.

    ``lead``: elements of the first block that another rank has.
    """

    def __init__(self, stack: Stack, table: _Table, keep: Keep, device: torch.device) -> None:
        self._table, self._lead = table, stack.span.inside % BLOCK
        blocks = (*stack.shape[:-1], -(-(self._lead + stack.span.width) // BLOCK))
        self._places = zeros(stack.shape, torch.uint8, keep.paged, device).fill_(table.zero)
        self._sizes = zeros(blocks, torch.float32, keep.paged, device)

    def take(self, rows: Rows, part: slice) -> torch.Tensor:
        """The rows of a part of the stack, ``[X, N, width]`` float32, to be changed and put back."""
        return self._table.decode(rows.of(self._places[part]), rows.of(self._sizes[part]), self._lead)

    def put(self, rows: Rows, part: slice, values: torch.Tensor) -> None:
        """Keep what was taken and changed."""
        places, sizes = self._table.encode(values, self._lead)
        rows.set(self._places[part], places)
        rows.set(self._sizes[part], sizes)

    def row(self, repeat: int, number: int) -> torch.Tensor:
        return self._table.decode(self._places[repeat, number], self._sizes[repeat, number], self._lead)

    def fill(self, values: torch.Tensor) -> None:
        for repeat, rows in enumerate(values):  # one by one, for what encoding makes beside them
            places, sizes = self._table.encode(rows.to(self._places.device), self._lead)
            self._places[repeat].copy_(places)
            self._sizes[repeat].copy_(sizes)

    def kept(self) -> Sequence[torch.Tensor]:
        return (self._places, self._sizes)


StackMoment = Float32Moment | EightBitMoment
"""One moment of a stack of rows."""


class _Table:
    """The numbers of an 8-bit type, rising, on a device. ``lead`` as in ``EightBitMoment``."""

    def __init__(self, signed: bool, device: torch.device) -> None:
        from bitsandbytes.functional import create_dynamic_map

        numbers = create_dynamic_map(signed=signed).sort().values
        if signed:
            numbers[0] = -1.0
        self.zero = int((numbers == 0).nonzero())
        self._numbers = numbers.to(device)
        self._between = (self._numbers[1:] + self._numbers[:-1]) / 2

    def encode(self, values: torch.Tensor, lead: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[..., width]`` float32 to the places of the nearest numbers, uint8, and sizes ``[..., J]``."""
        sizes = _blocks(values, lead).abs().amax(-1)
        sizes = torch.where(sizes < SMALLEST, 0.0, sizes)
        scaled = values / _spread(sizes.clamp_min(SMALLEST), values.shape[-1], lead)
        return torch.bucketize(scaled, self._between, out_int32=True).to(torch.uint8), sizes

    def decode(self, places: torch.Tensor, sizes: torch.Tensor, lead: int) -> torch.Tensor:
        return self._numbers[places.int()] * _spread(sizes, places.shape[-1], lead)


def _blocks(values: torch.Tensor, lead: int) -> torch.Tensor:
    """``[..., width]`` to ``[..., J, BLOCK]``, the first and last one filled up with zeros."""
    return F.pad(values, (lead, -(lead + values.shape[-1]) % BLOCK)).unflatten(-1, (-1, BLOCK))


def _spread(sizes: torch.Tensor, width: int, lead: int) -> torch.Tensor:
    """The size of each element's block, ``[..., J]`` to ``[..., width]``."""
    return sizes.unsqueeze(-1).expand(*sizes.shape, BLOCK).flatten(-2)[..., lead : lead + width]


@dataclass(frozen=True)
class MomentPart:
    """Elements of a moment of a shard, which ``read`` makes float32: a copy only where it is asked for."""

    moments: Moments
    kind: str
    index: int
    begin: int
    end: int

    def numel(self) -> int:
        return self.end - self.begin

    def __getitem__(self, part: slice) -> MomentPart:
        first, last, _ = part.indices(self.numel())
        return replace(self, begin=self.begin + first, end=self.begin + last)

    def read(self) -> torch.Tensor:
        """``[numel]`` float32."""
        return self.moments.read(self.kind, self.index, self.begin, self.end)


class Moments:
    """Both moments of all of a rank's shards.

    Args:
        shards: of this rank.
        stacks: of each shard's rows.
        keep: how.
        routers: the unit of the routers.
    """

    def __init__(
        self, shards: Sequence[Shard], stacks: Sequence[Sequence[Stack]], keep: Keep, routers: int
    ) -> None:
        self._shards, self._stacks, self._keep = shards, stacks, keep
        self._flats: dict[tuple[str, int], torch.Tensor] = {}
        self._tables: dict[tuple[str, torch.device], _Table] = {}
        self._of: dict[tuple[str, int], list[StackMoment]] = {}
        for kind in KINDS:
            for index, shard in enumerate(shards):
                device = shard.weights.device
                if keep.precision == "float32":
                    numel = (shard.flat().numel(),)
                    self._flats[kind, index] = zeros(numel, torch.float32, keep.paged, device)
                self._of[kind, index] = [
                    self._make(kind, index, stack, stack.span.units == (routers,), device)
                    for stack in stacks[index]
                ]

    def _make(
        self, kind: str, index: int, stack: Stack, of_routers: bool, device: torch.device
    ) -> StackMoment:
        if (kind, index) in self._flats:
            return Float32Moment(stack.of(self._flats[kind, index]))
        if of_routers:
            return Float32Moment(zeros(stack.shape, torch.float32, self._keep.paged, device))
        key = (kind, device)
        if key not in self._tables:
            self._tables[key] = _Table(signed=kind == "exp_avg", device=device)
        return EightBitMoment(stack, self._tables[key], self._keep, device)

    def of(self, index: int, number: int) -> list[StackMoment]:
        """Both moments of the ``number``-th stack of a shard."""
        return [self._of[kind, index][number] for kind in KINDS]

    def part(self, kind: str, index: int) -> MomentPart:
        """All of a moment of a shard, to be cut and read in parts."""
        return MomentPart(self, kind, index, 0, self._shards[index].flat().numel())

    def read(self, kind: str, index: int, begin: int, end: int) -> torch.Tensor:
        """Elements of a moment of a shard in float32, of which padding is left out."""
        if (kind, index) in self._flats:
            return self._flats[kind, index][begin:end]
        found = []
        for row, low in self._rows(kind, index, begin, end):
            found.append(row[max(begin - low, 0) : end - low])
        return torch.cat(found) if found else torch.zeros(0)

    def _rows(self, kind: str, index: int, begin: int, end: int) -> Iterator[tuple[torch.Tensor, int]]:
        """The rows between two elements of a shard, and where they begin."""
        stacks = self._stacks[index]
        number = bisect_right(stacks, begin, key=lambda stack: stack.end)
        for stack, own in zip(stacks[number:], self._of[kind, index][number:], strict=True):
            first, width = stack.span.start, stack.span.width
            if first >= end:
                return
            for row in range(max(begin - first, 0) // width, -(-(min(end, stack.end) - first) // width)):
                yield own.row(*divmod(row, stack.span.count)), first + row * width

    def flat(self, kind: str, index: int) -> torch.Tensor:
        """A moment of a shard in float32: the kept tensor, or where that is 8-bit a copy on the host."""
        if (kind, index) in self._flats:
            return self._flats[kind, index]
        whole = torch.zeros(self._shards[index].flat().numel())
        for row, low in self._rows(kind, index, 0, len(whole)):
            whole[low : low + len(row)].copy_(row)
        return whole

    def num_bytes(self) -> int:
        """That they take."""
        kept = [tensor for own in self._of.values() for one in own for tensor in one.kept()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in kept}.values())

    def fill(self, kind: str, index: int, flat: torch.Tensor) -> None:
        """Replace a moment of a shard by what ``flat`` gave and somebody has changed."""
        for stack, own in zip(self._stacks[index], self._of[kind, index], strict=True):
            own.fill(stack.of(flat))


def zeros(shape: Sequence[int], dtype: torch.dtype, paged: bool, device: torch.device) -> torch.Tensor:
    """Zeros on a device, in paged memory of the driver if asked for."""
    if not paged:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    assert device.type == "cuda", "paged memory is CUDA's"
    return _paged(tuple(shape), dtype, device).zero_()


def _paged(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """bitsandbytes hands out managed memory as if it were the host's; here as the device sees it."""
    from bitsandbytes.functional import get_paged

    owner = get_paged(max(1, math.prod(shape)) * dtype.itemsize, dtype=torch.uint8, device=device)
    bytes_ = torch.as_tensor(_Managed(owner), device=device)
    return bytes_[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class _Managed:
    """Managed memory for ``torch.as_tensor``, which keeps it alive."""

    def __init__(self, owner: torch.Tensor) -> None:
        self._owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(owner.shape),
            "typestr": "|u1",
            "data": (owner.data_ptr(), False),
            "version": 2,
        }
