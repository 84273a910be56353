"""What one rank writes of a checkpoint: its elements in files of bounded size, and a list of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from dsmixer.checkpoint.atomic import flush, write_json
from dsmixer.checkpoint.schema import index_name, part_name

FILE_BYTES = 2**30
"""Largest file of tensors; also the most that a rank has on the host beside what it trains while it saves."""


class Part(Protocol):
    """Elements that are float32 only once they are read."""

    def numel(self) -> int: ...

    def __getitem__(self, part: slice) -> Part: ...

    def read(self) -> torch.Tensor:
        """``[numel]``."""


@dataclass(frozen=True)
class Source:
    """Consecutive elements of one expert's weights on one projection, or of a router.

    Attributes:
        name: of the parameter in the model.
        expert: its name; None for a router.
        inside: where they start in the expert's (or router's) flattened weights.
        tensors: by kind, flat, as long as each other.
    """

    name: str
    expert: str | None
    inside: int
    tensors: Mapping[str, torch.Tensor | Part]

    @property
    def numel(self) -> int:
        return next(iter(self.tensors.values())).numel()

    @property
    def num_bytes(self) -> int:
        return 4 * self.numel * len(self.tensors)

    def cut(self, begin: int, end: int) -> Source:
        """A part of it."""
        tensors = {kind: tensor[begin:end] for kind, tensor in self.tensors.items()}
        return Source(self.name, self.expert, self.inside + begin, tensors)


def write_parts(
    folder: Path,
    rank: int,
    sources: Iterable[Source],
    small: Mapping[str, torch.Tensor] | None = None,
    *,
    file_bytes: int = FILE_BYTES,
) -> list[str]:
    """Write a rank's files and flush them.

    Args:
        folder: that exists; other ranks may write into it at the same time.
        rank: world rank, which is in the files' names.
        sources: what to write, in any order.
        small: tensors of one rank alone, such as the usage of the step before, by name.
        file_bytes: bound of a file's tensors.

    Returns:
        Names of the files.

    Raises:
        OSError, SafetensorError: no space, or no right to write.
    """
    parts: list[dict[str, Any]] = []
    for batch in _batches(sources, file_bytes):
        tensors, runs = _laid_out(batch)
        parts.append({"file": part_name(rank, len(parts)), "runs": runs})
        save_file(tensors, folder / parts[-1]["file"])
    if small:
        parts.append({"file": part_name(rank, len(parts)), "small": sorted(small)})
        kept = {name: tensor.float().cpu().contiguous() for name, tensor in small.items()}
        save_file(kept, folder / parts[-1]["file"])
    for part in parts:
        flush(folder / part["file"])
    write_json(folder / index_name(rank), {"parts": parts}, indent=None)
    return [index_name(rank), *(part["file"] for part in parts)]


def _batches(sources: Iterable[Source], file_bytes: int) -> Iterator[list[Source]]:
    """Sources for one file each; one that is too long for a file is cut."""
    batch: list[Source] = []
    used = 0
    for source in sources:
        longest = max(1, file_bytes // (4 * len(source.tensors)))
        for begin in range(0, source.numel, longest):
            part = source.cut(begin, min(begin + longest, source.numel))
            if batch and used + part.num_bytes > file_bytes:
                yield batch
                batch, used = [], 0
            batch.append(part)
            used += part.num_bytes
    if batch:
        yield batch


def _laid_out(batch: Sequence[Source]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file, one a kind and parameter, and where in them everything is.

    Of a bank ``{NAME: {EXPERT: [[inside, numel, offset], ...]}}``, of a router ``{NAME: [[...], ...]}``.
    """
    by_name: dict[str, list[Source]] = {}
    for source in batch:
        by_name.setdefault(source.name, []).append(source)
    tensors: dict[str, torch.Tensor] = {}
    runs: dict[str, Any] = {}
    for name, own in by_name.items():
        total = sum(source.numel for source in own)
        for kind in own[0].tensors:
            tensors[f"{kind}/{name}"] = torch.empty(total, dtype=torch.float32)
        offset = 0
        for source in own:
            for kind, tensor in source.tensors.items():
                values = tensor if isinstance(tensor, torch.Tensor) else tensor.read()
                tensors[f"{kind}/{name}"][offset : offset + source.numel].copy_(values)
            place = [source.inside, source.numel, offset]
            if source.expert is None:
                runs.setdefault(name, []).append(place)
            else:
                runs.setdefault(name, {}).setdefault(source.expert, []).append(place)
            offset += source.numel
    return tensors, runs


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Size and digest, as the manifest keeps them."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
