"""Experts with several owners in a group: their gradients are added up, so that all owners make one step.

DeepSpeed adds the gradients of a bank over the ranks that hold the same bank, those with the same place in
their groups. An expert that two places hold has two such sums; what follows makes one of them, on the ranks
that hold it alone. Owners then update it alike, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dsmixer.placement.groups import full_shape
from dsmixer.placement.layout import ExpertLayout
from dsmixer.placement.pieces import Shard, is_bank, runs_of


@dataclass(frozen=True)
class _Stretch:
    """Where a run of an expert's gradient lies on this rank and in the buffer that is added up."""

    shard: int
    piece: int
    begin: int
    offset: int
    numel: int


@dataclass(frozen=True, eq=False)
class _Shared:
    """An expert that this rank holds with others."""

    group: dist.ProcessGroup
    stretches: tuple[_Stretch, ...]
    numel: int


class SharedExperts:
    """Adds up gradients of experts with several owners.

    Made on every rank, because each expert's process group is.

    Args:
        engine: the DeepSpeed engine.
        shards: ``groups.shards(engine)``.
        layout: the experts of each rank of a group.
    """

    def __init__(self, engine: Any, shards: Sequence[Shard], layout: ExpertLayout) -> None:
        self._device = engine.device
        banks = {
            name: math.prod(full_shape(parameter)[1:])
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad and is_bank(name)
        }
        self._shared = []
        for expert in layout.several if banks else ():
            group = _group_of(layout.owners[expert], layout.size)
            if expert in layout.local:
                stretches = _stretches(shards, layout, expert, banks)
                self._shared.append(_Shared(group, stretches, sum(banks.values())))

    @torch.no_grad()
    def add_up(self, grads: list[list[torch.Tensor]]) -> None:
        """Add up in place; ``grads`` as ``groups.gradients`` gives them. One all-reduce a shared expert."""
        for shared in self._shared:
            buffer = torch.zeros(shared.numel, device=self._device)
            for at in shared.stretches:
                buffer[at.offset : at.offset + at.numel] = _part(grads, at)
            dist.all_reduce(buffer, group=shared.group)
            for at in shared.stretches:
                _part(grads, at).copy_(buffer[at.offset : at.offset + at.numel])


def _part(grads: list[list[torch.Tensor]], at: _Stretch) -> torch.Tensor:
    return grads[at.shard][at.piece][at.begin : at.begin + at.numel]


_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
"""Process groups by their ranks, made once: stage two uses those of stage one."""


def _group_of(places: Sequence[int], size: int) -> dist.ProcessGroup:
    """The ranks with one of these places in their groups of ``size``; every rank must call it."""
    ranks = tuple(rank for rank in range(dist.get_world_size()) if rank % size in places)
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(ranks))
    return _groups[ranks]


def _stretches(
    shards: Sequence[Shard], layout: ExpertLayout, expert: int, banks: dict[str, int]
) -> tuple[_Stretch, ...]:
    offsets, total = {}, 0
    for name, width in banks.items():
        offsets[name], total = total, total + width
    return tuple(
        _Stretch(i, j, run.flat_start - piece.flat_start, offsets[piece.name] + run.inside, run.numel)
        for i, shard in enumerate(shards)
        for j, piece in enumerate(shard.pieces)
        if is_bank(piece.name)
        for run in runs_of(piece, layout)
        if run.unit == expert
    )
