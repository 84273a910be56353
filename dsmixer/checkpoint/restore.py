"""Read a checkpoint: of any of its experts the elements that are wanted, wherever they were written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dsmixer.checkpoint.schema import CONFIG, KINDS, STATE, CheckpointState
from dsmixer.checkpoint.verify import read_manifest
from dsmixer.config.errors import UserError


@dataclass(frozen=True)
class Wanted:
    """Consecutive elements of one expert's weights on one projection, or of a router, and where they go.

    Attributes:
        name: of the parameter in the model.
        expert: its name; None for a router.
        inside: where they start in the expert's (or router's) flattened weights.
        into: flat; as many elements as are wanted.
    """

    name: str
    expert: str | None
    inside: int
    into: torch.Tensor


@dataclass(frozen=True)
class _Saved:
    """A run of elements in a file: ``inside`` as above, ``offset`` in the file's tensor."""

    file: str
    inside: int
    numel: int
    offset: int


class SavedCheckpoint:
    """A checkpoint folder whose files were found to be what was saved.

    Args:
        path: the folder.

    Attributes:
        state: what is not a tensor.

    Raises:
        UserError: another version of dsmixer wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = read_state(path)
        self._runs: dict[tuple[str, str | None], list[_Saved]] = {}
        self._small: dict[str, str] = {}
        for name in read_manifest(path):
            if name.startswith("rank-") and name.endswith(".json"):
                self._take(json.loads((path / name).read_text()))

    def _take(self, index: dict[str, Any]) -> None:
        for part in index["parts"]:
            file = part["file"]
            self._small |= dict.fromkeys(part.get("small", ()), file)
            for name, below in part.get("runs", {}).items():
                for expert, places in below.items() if isinstance(below, dict) else ((None, below),):
                    own = self._runs.setdefault((name, expert), [])
                    own += [_Saved(file, inside, numel, offset) for inside, numel, offset in places]

    @property
    def config(self) -> str:
        """The text of the configuration under which it was saved."""
        return (self.path / CONFIG).read_text(encoding="utf-8")

    @torch.no_grad()
    def fill(self, kind: str, wanted: Iterable[Wanted]) -> None:
        """Read elements of a kind to where they are wanted; nothing else of the files is read.

        Raises:
            UserError: the checkpoint does not hold them.
        """
        by_file: dict[str, list[tuple[str, int, torch.Tensor]]] = {}
        for want in wanted:
            for file, begin, into in self._places(want):
                by_file.setdefault(file, []).append((f"{kind}/{want.name}", begin, into))
        for file, reads in by_file.items():
            with safe_open(self.path / file, "pt") as tensors:
                slices = {key: tensors.get_slice(key) for key in {key for key, _, _ in reads}}
                for key, begin, into in reads:
                    into.copy_(slices[key][begin : begin + into.numel()])

    def _places(self, want: Wanted) -> Iterator[tuple[str, int, torch.Tensor]]:
        """File, start in its tensor, and destination of each part of what is wanted."""
        found, end = 0, want.inside + want.into.numel()
        for saved in self._runs.get((want.name, want.expert), ()):
            begin, stop = max(saved.inside, want.inside), min(saved.inside + saved.numel, end)
            if begin < stop:
                found += stop - begin
                yield (
                    saved.file,
                    saved.offset + begin - saved.inside,
                    want.into[begin - want.inside : stop - want.inside],
                )
        if found != want.into.numel():
            raise UserError(
                f"{want.name} of {want.expert or 'the router'} is not whole: {found:,} of "
                f"{want.into.numel():,} numbers",
                where=str(self.path),
                fix="go on from another checkpoint with --from",
            )

    def small(self, name: str) -> torch.Tensor | None:
        """A small tensor that rank 0 saved beside its own, or None."""
        if name not in self._small:
            return None
        with safe_open(self.path / self._small[name], "pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
            return tensor

    def kinds(self) -> list[str]:
        """Which of ``KINDS`` it holds."""
        file = next(iter(self._runs.values()))[0].file
        with safe_open(self.path / file, "pt") as tensors:
            there = {key.split("/")[0] for key in tensors.keys()}  # noqa: SIM118 (safe_open does not iterate)
        return [kind for kind in KINDS if kind in there]

    def whole(self, kind: str) -> dict[str, torch.Tensor]:
        """All of a kind in memory, by parameter name: a bank ``[E, ...]`` with the whole pool.

        For tests and tools; a run never puts a pool together.
        """
        found: dict[str, torch.Tensor] = {}
        if kind not in self.kinds():
            return found
        for name, shape in self.state.shapes.items():
            found[name] = torch.empty(shape)
            flat = found[name].view(1, -1)
            experts: list[str | None] = [None]
            if (name, None) not in self._runs:
                flat, experts = found[name].view(shape[0], -1), list(self.state.experts)
            self.fill(
                kind,
                (Wanted(name, expert, 0, row) for expert, row in zip(experts, flat, strict=True)),
            )
        return found


def read_state(path: Path) -> CheckpointState:
    """The state alone.

    Raises:
        UserError: another version of dsmixer wrote it.
    """
    return CheckpointState.from_dict(json.loads((path / STATE).read_text()), str(path / STATE))


def read_whole(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """All of ``weights``, ``exp_avg``, ``exp_avg_sq`` or ``origin`` of a checkpoint, by parameter name."""
    return SavedCheckpoint(path).whole(kind)
