"""Rows of examples to the tensors of a micro-batch.

There is no attention mask. transformers derives the block-diagonal mask from the restarts of
``position_ids``, if it is given no mask and no cache: call the model with ``use_cache=False``. Flash
attention does so for a single row only: hand it ``MicroBatch.flat()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsmixer.data.sampler import StepSampler
from dsmixer.data.store import IGNORED, TokenStore

PADDING = -1
"""The domain and example id of padding."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """B rows of S tokens each, right-padded.

    Attributes:
        input_ids: int64 ``[B, S]``.
        labels: int64 ``[B, S]``, the token at t itself, or -100 where it is no target.
        position_ids: int64 ``[B, S]``, from 0 in each example and in the padding behind them.
        domain_ids: int64 ``[B, S]``, -1 on padding.
        example_ids: int64 ``[B, S]``, the example's index in the store, -1 on padding.
        num_tokens: tokens that are not padding.
        num_targets: tokens with loss.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    domain_ids: torch.Tensor
    example_ids: torch.Tensor
    num_tokens: int
    num_targets: int

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def flat(self) -> MicroBatch:
        """The same tokens as one row, ``[1, B * S]``; no example sees another there either."""
        return self._mapped(lambda tensor: tensor.reshape(1, -1))

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        return MicroBatch(
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            position_ids=function(self.position_ids),
            domain_ids=function(self.domain_ids),
            example_ids=function(self.example_ids),
            num_tokens=self.num_tokens,
            num_targets=self.num_targets,
        )


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One world rank's share of an optimizer step, with the counts of the whole step.

    Attributes:
        micro_batches: this rank's micro-batches, in order; as many on every rank.
        target_tokens: int64 ``[num_domains]``, tokens with loss of each domain over all ranks.
        real_tokens: tokens that are not padding, over all ranks.
    """

    micro_batches: list[MicroBatch]
    target_tokens: torch.Tensor
    real_tokens: int


def collate(store: TokenStore, rows: Sequence[Sequence[int]], pad_token_id: int) -> MicroBatch:
    """Lay rows out as tensors, padded to the longest row; an empty row is all padding.

    Args:
        store: the tokenised examples.
        rows: B rows of example indices.
        pad_token_id: the token that fills rows; no token attends to it from outside the padding.
    """
    examples = [np.asarray(row, dtype=np.int64) for row in rows]
    used = [int(store.lengths[row].sum()) for row in examples]
    shape = (len(rows), max(1, *used))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels, position_ids = np.full(shape, IGNORED, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    domain_ids, example_ids = (np.full(shape, PADDING, dtype=np.int64) for _ in range(2))
    counting = np.arange(shape[1])
    for b, row in enumerate(examples):
        start = 0
        for example in row.tolist():
            length = int(store.lengths[example])
            span = slice(start, start + length)
            input_ids[b, span] = store.input_ids(example)
            targets = slice(start + int(store.target_starts[example]), start + length)
            labels[b, targets] = input_ids[b, targets]
            position_ids[b, span] = counting[:length]
            domain_ids[b, span] = store.domain_ids[example]
            example_ids[b, span] = example
            start += length
        position_ids[b, start:] = counting[: shape[1] - start]
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(position_ids),
        torch.from_numpy(domain_ids),
        torch.from_numpy(example_ids),
        num_tokens=sum(used),
        num_targets=sum(int(store.target_counts[row].sum()) for row in examples),
    )


def step_batch(
    sampler: StepSampler,
    store: TokenStore,
    step: int,
    *,
    world_rank: int,
    world_size: int,
    micro_batch_size: int,
    pad_token_id: int,
    expert_parallel_size: int = 1,
) -> StepBatch:
    """One rank's micro-batches of a step: each rank takes one of ``world_size`` equal runs of rows.

    The runs go to ranks so that those with the same place in their expert-parallel groups have neighbouring
    ones: together they are the stretch of slots that the place owns (``placement.owners``).

    Args:
        sampler: the order of the data.
        store: the examples it orders.
        step: the step's number from 0.
        world_rank: this rank.
        world_size: W; times ``micro_batch_size`` it divides the sampler's ``global_batch_size``.
        micro_batch_size: rows a micro-batch.
        pad_token_id: see ``collate``.
        expert_parallel_size: EP; ranks of a group follow each other.
    """
    rows = sampler.rows(step)
    assert len(rows) % (world_size * micro_batch_size) == 0, (
        f"{len(rows)} rows, {world_size} x {micro_batch_size}"
    )
    per_rank = len(rows) // world_size
    group, place = divmod(world_rank, expert_parallel_size)
    begin = (place * (world_size // expert_parallel_size) + group) * per_rank
    micro_batches = [
        collate(store, rows[first : first + micro_batch_size], pad_token_id)
        for first in range(begin, begin + per_rank, micro_batch_size)
    ]
    examples = np.array([example for row in rows for example in row], dtype=np.int64)
    targets = np.zeros(sampler.num_domains, dtype=np.int64)
    np.add.at(targets, store.domain_ids[examples], store.target_counts[examples])
    return StepBatch(micro_batches, torch.from_numpy(targets), int(store.lengths[examples].sum()))
