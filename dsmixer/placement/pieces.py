"""Which part of which parameter stands where in ZeRO's flat partitions, and which expert it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dsmixer.placement.layout import ExpertLayout


@dataclass(frozen=True)
class Piece:
    """A run of consecutive elements of one parameter inside a flat partition.

    Attributes:
        name: the parameter's name in the model.
        shape: its full shape.
        param_start: where the run starts in the flattened parameter.
        flat_start: where it starts in the partition.
        numel: its length.
    """

    name: str
    shape: tuple[int, ...]
    param_start: int
    flat_start: int
    numel: int


@dataclass(frozen=True)
class Shard:
    """One tensor that this rank's optimizer updates, and what it is made of.

    Attributes:
        weights: float32, the very tensor DeepSpeed hands to the optimizer.
        pieces: in the order of ``flat_start``; what lies between and after them is padding.
    """

    weights: torch.Tensor
    pieces: tuple[Piece, ...]

    def flat(self) -> torch.Tensor:
        return self.weights.detach().view(-1)


def is_bank(name: str) -> bool:
    """Whether a parameter is a stack of experts, and not a router."""
    return ".bank." in name


def whole_shape(name: str, shape: tuple[int, ...], layout: ExpertLayout) -> tuple[int, ...]:
    """The shape of a parameter over all ranks: a bank with the whole pool."""
    return (layout.num_experts, *shape[1:]) if is_bank(name) else shape


@dataclass(frozen=True)
class Run:
    """Elements of one expert (or of a router) that lie together in a partition.

    Attributes:
        unit: the expert in the pool; None for a router.
        inside: where they start in the expert's (or router's) flattened weights.
        flat_start: where they start in the partition.
        numel: how many.
    """

    unit: int | None
    inside: int
    flat_start: int
    numel: int

    def of_flat(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.flat_start : self.flat_start + self.numel]


def runs_of(piece: Piece, layout: ExpertLayout) -> list[Run]:
    """A piece cut at its experts."""
    if not is_bank(piece.name):
        return [Run(None, piece.param_start, piece.flat_start, piece.numel)]
    width = math.prod(piece.shape[1:])
    found, done = [], 0
    while done < piece.numel:
        place, inside = divmod(piece.param_start + done, width)
        numel = min(width - inside, piece.numel - done)
        found.append(Run(layout.local[place], inside, piece.flat_start + done, numel))
        done += numel
    return found


def all_runs(of: Sequence[Shard], layout: ExpertLayout) -> Iterator[tuple[int, str, Run]]:
    """Index of the shard, name of the parameter, and run, of everything in a rank's shards."""
    for index, shard in enumerate(of):
        for piece in shard.pieces:
            for run in runs_of(piece, layout):
                yield index, piece.name, run


def runs_to_save(
    of: Sequence[Shard], layout: ExpertLayout, share: tuple[int, int] | None = None
) -> Iterator[tuple[int, str, Run]]:
    """Those of ``all_runs`` that this rank saves: over all ranks, each element of the pool once.

    Args:
        of: the rank's shards.
        layout: of the experts; of several owners in a group the first one saves.
        share: ``(rank, size)`` where every rank's shards hold everything, so that each takes every
            ``size``-th run.
    """
    for number, (index, name, run) in enumerate(all_runs(of, layout)):
        if share is not None and number % share[1] != share[0]:
            continue
        if run.unit is None or layout.speaks_for(run.unit):
            yield index, name, run
