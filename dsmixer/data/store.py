"""Tokenised examples as columns, in memory or mapped from an Arrow file."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dsmixer.config.errors import UserError

IGNORED = -100
"""The label of a token without loss, as transformers has it."""

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("target_start", pa.int32())])


@dataclass(frozen=True, eq=False)
class TokenStore:
    """N tokenised examples. Of each, the tokens from ``target_starts[i]`` on are targets, never the first.

    The first token of an example has no target because in a packed row the token before it belongs to
    another example. Where ``decoder_start`` is given, the store is for an encoder-decoder model: the encoder
    reads the tokens before the first target, and the decoder writes the targets.

    Attributes:
        columns: Arrow table of ``SCHEMA``, N rows.
        domain_ids: int64 ``[N]``.
        locations: where each example came from, for messages.
        fingerprint: digest of texts, tokenizer and settings.
        decoder_start: the token from which the decoder starts to write; None: there is no encoder.
    """

    columns: pa.Table
    domain_ids: np.ndarray
    locations: Sequence[str]
    fingerprint: str
    decoder_start: int | None = None

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 ``[N]``."""
        return _numpy(pc.list_value_length(self.columns["input_ids"]))

    @cached_property
    def target_starts(self) -> np.ndarray:
        """Index of each example's first target, int64 ``[N]``, at least 1."""
        return _numpy(self.columns["target_start"])

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Tokens with loss of each example, int64 ``[N]``, at least 1."""
        return self.lengths - self.target_starts

    @cached_property
    def _tokens(self) -> pa.ChunkedArray:
        return self.columns["input_ids"]

    def input_ids(self, i: int) -> np.ndarray:
        """The example's tokens, int32 ``[lengths[i]]``, without a copy."""
        return np.asarray(self._tokens[i].values.to_numpy(zero_copy_only=True))

    def labels(self, i: int) -> np.ndarray:
        """The example's labels, int64 ``[lengths[i]]``: the token itself, or -100 where it is no target."""
        labels = self.input_ids(i).astype(np.int64)
        labels[: self.target_starts[i]] = IGNORED
        return labels


def record_batch(token_ids: Sequence[Sequence[int]], target_starts: Sequence[int]) -> pa.RecordBatch:
    """Tokenised examples as one batch of ``SCHEMA``."""
    return pa.record_batch(
        [pa.array(token_ids, SCHEMA[0].type), pa.array(target_starts, SCHEMA[1].type)], SCHEMA
    )


def cached_table(batches: Iterable[pa.RecordBatch], path: Path, num_rows: int) -> pa.Table:
    """The table kept at ``path``, mapped into memory; computed and written first where it is not there.

    The file is the Arrow stream that ``datasets.Dataset.from_file`` reads. It appears whole or not at all, so
    several processes may ask for it at once; one that cannot be read is made again.

    Raises:
        UserError: the file cannot be written.
    """
    table = _mapped(path, num_rows)
    if table is not None:
        return table
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(batches, path)
    except OSError as error:
        problem = f"the token cache cannot be written: {error}"
        raise UserError(problem, where=str(path), fix="free space, or change data.cache_dir") from error
    table = _mapped(path, num_rows)
    assert table is not None, f"{path} was written and cannot be read"
    return table


def _write(batches: Iterable[pa.RecordBatch], path: Path) -> None:
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # other nodes may share the folder
    try:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _mapped(path: Path, num_rows: int) -> pa.Table | None:
    if not path.is_file():
        return None
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError):
        return None
    return table if table.schema == SCHEMA and table.num_rows == num_rows else None


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), dtype=np.int64)
