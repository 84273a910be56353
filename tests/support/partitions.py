"""Pools of experts laid out over ranks that are not there: what DeepSpeed's partitions would hold of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsmixer.checkpoint.parts import FILE_BYTES, Source, file_entry, write_parts
from dsmixer.checkpoint.publish import begin_save, building_folder, finish_save
from dsmixer.checkpoint.restore import SavedCheckpoint, Wanted
from dsmixer.checkpoint.schema import KINDS, CheckpointState
from dsmixer.placement.layout import ExpertLayout
from dsmixer.placement.pieces import Piece, Shard, all_runs, is_bank, runs_to_save

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FakePool:
    """Experts on some projections, and their routers: a different number for every element of every kind."""

    num_experts: int
    shapes: tuple[tuple[int, int], ...]

    @property
    def names(self) -> list[str]:
        return [f"expert{e}" for e in range(self.num_experts)]

    def whole(self, kind: str) -> Tensors:
        """Banks ``[E, R, D]`` and routers ``[E, D]``."""
        found: Tensors = {}
        start = KINDS.index(kind) * 10_000
        for i, (rank, width) in enumerate(self.shapes):
            for name, shape in (
                (f"m.{i}.bank.lora_A", (self.num_experts, rank, width)),
                (f"m.{i}.router.weight", (self.num_experts, width)),
            ):
                numel = math.prod(shape)
                found[name] = torch.arange(start, start + numel, dtype=torch.float32).view(shape)
                start += numel
        return found


@dataclass(frozen=True)
class FakeRanks:
    """A layout of a pool over ``len(owned) x replicas`` ranks.

    Attributes:
        owned: experts of each place in a group.
        replicas: groups; each place's bank is cut among as many ranks.
        cuts: where, as shares of the whole from 0 to 1; empty: every rank holds everything, as under ZeRO-0.
    """

    owned: tuple[tuple[int, ...], ...]
    replicas: int
    cuts: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        return len(self.owned) * self.replicas

    def layout(self, rank: int) -> ExpertLayout:
        return ExpertLayout(self.owned, rank % len(self.owned))

    def share(self, rank: int) -> tuple[int, int] | None:
        return None if self.cuts else (rank, self.size)

    def pieces(self, pool: FakePool, rank: int) -> list[list[Piece]]:
        """The pieces of each shard of a rank."""
        group, place = divmod(rank, len(self.owned))
        local = len(self.owned[place])
        banks = [(n, (local, *t.shape[1:])) for n, t in pool.whole("weights").items() if is_bank(n)]
        routers = [(n, tuple(t.shape)) for n, t in pool.whole("weights").items() if not is_bank(n)]
        if not self.cuts:
            return [[Piece(name, shape, 0, 0, math.prod(shape))] for name, shape in banks + routers]
        return [
            _stretch(banks, self._bounds(group, self.replicas)),
            _stretch(routers, self._bounds(rank, self.size)),
        ]

    def _bounds(self, index: int, parts: int) -> tuple[float, float]:
        inner = sorted((self.cuts * parts)[: parts - 1])
        return (0.0, *inner, 1.0)[index], (0.0, *inner, 1.0)[index + 1]

    def shards(self, pool: FakePool, rank: int, kind: str, *, empty: bool = False) -> list[Shard]:
        """What a rank holds of a kind, with padding at the end; ``empty``: not a number everywhere."""
        whole, layout, found = pool.whole(kind), self.layout(rank), []
        for pieces in self.pieces(pool, rank):
            length = sum(piece.numel for piece in pieces) + 3
            found.append(Shard(torch.full((length,), float("nan")), tuple(pieces)))
        if not empty:
            for index, name, run in all_runs(found, layout):
                of_unit = whole[name].view(1 if run.unit is None else pool.num_experts, -1)[run.unit or 0]
                run.of_flat(found[index].flat()).copy_(of_unit[run.inside : run.inside + run.numel])
        return found


def _stretch(named: Sequence[tuple[str, tuple[int, ...]]], bounds: tuple[float, float]) -> list[Piece]:
    """The pieces of parameters, one after another, that lie between two shares of their whole length."""
    total = sum(math.prod(shape) for _, shape in named)
    low, high = (round(bound * total) for bound in bounds)
    pieces, offset = [], 0
    for name, shape in named:
        start, end = max(offset, low), min(offset + math.prod(shape), high)
        if start < end:
            pieces.append(Piece(name, shape, start - offset, start - low, end - start))
        offset += math.prod(shape)
    return pieces


def fake_state(pool: FakePool, step: int, loss: float | None = None) -> CheckpointState:
    """The state of stage one after a step."""
    return CheckpointState(
        stage=1,
        step=step,
        num_steps=100,
        experts=pool.names,
        ranks=[rank for rank, _ in pool.shapes[:1]] * pool.num_experts,
        shapes={name: list(tensor.shape) for name, tensor in pool.whole("weights").items()},
        unit_steps=[step] * (pool.num_experts + 1),
        cursor={"step": step},
        rows={"stage1": 8},
        loss=loss,
        layout={"ranks": 1, "zero_stage": 1, "expert_parallel_size": 1},
        versions={},
    )


def save_fake(
    folder: Path,
    pool: FakePool,
    ranks: FakeRanks,
    step: int,
    *,
    file_bytes: int = FILE_BYTES,
    small: Tensors | None = None,
    loss: float | None = None,
    config: str = "run: {}\n",
    state: Mapping[str, Any] | None = None,
) -> Path:
    """Save as all ranks of a run would, one after the other; ``state``: what is other than ``fake_state``."""
    begin_save(folder, step, 0)
    building = building_folder(folder, step)
    entries = {}
    for rank in range(ranks.size):
        sources = list(fake_sources(pool, ranks, rank))
        own = write_parts(building, rank, sources, small if rank == 0 else None, file_bytes=file_bytes)
        entries |= {name: file_entry(building / name) for name in own}
    return finish_save(folder, replace(fake_state(pool, step, loss), **(state or {})), config, entries)


def fake_sources(pool: FakePool, ranks: FakeRanks, rank: int) -> Iterator[Source]:
    """What a rank saves."""
    shards = {kind: ranks.shards(pool, rank, kind) for kind in KINDS}
    for index, name, run in runs_to_save(shards["weights"], ranks.layout(rank), ranks.share(rank)):
        expert = None if run.unit is None else pool.names[run.unit]
        tensors = {kind: run.of_flat(shards[kind][index].flat()) for kind in KINDS}
        yield Source(name, expert, run.inside, tensors)


def load_fake(saved: SavedCheckpoint, pool: FakePool, ranks: FakeRanks, rank: int, kind: str) -> list[Shard]:
    """What a rank of another layout reads."""
    shards = ranks.shards(pool, rank, kind, empty=True)
    saved.fill(
        kind,
        (
            Wanted(
                name,
                None if run.unit is None else pool.names[run.unit],
                run.inside,
                run.of_flat(shards[index].flat()),
            )
            for index, name, run in all_runs(shards, ranks.layout(rank))
        ),
    )
    return shards
