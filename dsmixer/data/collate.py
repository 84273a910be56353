"""Rows of examples to the tensors of a micro-batch.

A decoder alone has no attention mask. transformers derives the block-diagonal mask from the restarts of
``position_ids``, if it is given no mask and no cache: call the model with ``use_cache=False``. Flash
attention does so for a single row only: hand it ``MicroBatch.flat()``.

For an encoder-decoder model a row is one example: its prompt in the encoder, whose padding is masked, its
completion in the decoder, whose padding comes after all that counts. The decoder reads the start token and
then what it has written, so that position t predicts the label at t itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dsmixer.data.sampler import StepSampler
from dsmixer.data.store import IGNORED, TokenStore
from dsmixer.losses.task import shift_labels

PADDING = -1
"""The domain and example id of padding."""


Tensors = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class EncoderRows:
    """What the encoder reads: B rows of S' tokens each, right-padded.

    Attributes:
        input_ids: int64 ``[B, S']``.
        attention_mask: int64 ``[B, S']``, 1 on tokens, 0 on padding; 1 at the start of a row that is empty,
            whose decoder has to attend to something.
        domain_ids: int64 ``[B, S']``, -1 on padding.
        example_ids: int64 ``[B, S']``, -1 on padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    domain_ids: torch.Tensor
    example_ids: torch.Tensor

    def _mapped(self, function: Tensors) -> EncoderRows:
        return EncoderRows(
            function(self.input_ids),
            function(self.attention_mask),
            function(self.domain_ids),
            function(self.example_ids),
        )


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """B rows of S tokens each, right-padded; of an encoder-decoder model, what the decoder reads.

    Attributes:
        input_ids: int64 ``[B, S]``.
        labels: int64 ``[B, S]``, or -100 where there is no target: the token at t itself; with an encoder,
            the token to be written after it.
        position_ids: int64 ``[B, S]``, from 0 in each example and in the padding behind them.
        domain_ids: int64 ``[B, S]``, -1 on padding.
        example_ids: int64 ``[B, S]``, the example's index in the store, -1 on padding.
        num_tokens: tokens that are not padding, the encoder's among them.
        num_targets: tokens with loss.
        encoder: what the encoder reads, in an encoder-decoder model.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    domain_ids: torch.Tensor
    example_ids: torch.Tensor
    num_tokens: int
    num_targets: int
    encoder: EncoderRows | None = None

    @property
    def targets(self) -> torch.Tensor:
        """The token that each position predicts, int64 ``[B, S]``, -100 where it has none."""
        return shift_labels(self.labels) if self.encoder is None else self.labels

    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model's forward pass is given of the batch."""
        if self.encoder is None:
            return {"input_ids": self.input_ids, "position_ids": self.position_ids}
        encoder = self.encoder
        sides = {"input_ids": encoder.input_ids, "attention_mask": encoder.attention_mask}
        return {**sides, "decoder_input_ids": self.input_ids}

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on another device; the host waits for no copy out of pinned memory."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same in memory that a GPU reads by itself."""
        return self._mapped(torch.Tensor.pin_memory)

    def flat(self) -> MicroBatch:
        """The same tokens as one row, ``[1, B * S]``; no example sees another there either."""
        assert self.encoder is None, "an encoder keeps examples apart by rows"
        return self._mapped(lambda tensor: tensor.reshape(1, -1))

    def _mapped(self, function: Tensors) -> MicroBatch:
        return replace(
            self,
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            position_ids=function(self.position_ids),
            domain_ids=function(self.domain_ids),
            example_ids=function(self.example_ids),
            encoder=None if self.encoder is None else self.encoder._mapped(function),
        )


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One world rank's share of an optimizer step, with the counts of the whole step.

    Attributes:
        micro_batches: this rank's micro-batches, in order; as many on every rank.
        target_tokens: int64 ``[num_domains]``, tokens with loss of each domain over all ranks.
        real_tokens: tokens that are not padding, the encoder's among them, over all ranks.
        encoder_tokens: of them the encoder's.
    """

    micro_batches: list[MicroBatch]
    target_tokens: torch.Tensor
    real_tokens: int
    encoder_tokens: int = 0

    def pinned(self) -> StepBatch:
        """Its micro-batches in pinned memory."""
        return replace(self, micro_batches=[micro.pinned() for micro in self.micro_batches])


def collate(store: TokenStore, rows: Sequence[Sequence[int]], pad_token_id: int) -> MicroBatch:
    """Lay rows out as tensors, padded to the longest row; an empty row is all padding.

    Args:
        store: the tokenised examples.
        rows: B rows of example indices.
        pad_token_id: the token that fills rows; no token attends to it from outside the padding.
    """
    if store.decoder_start is not None:
        return _two_sides(store, rows, pad_token_id, store.decoder_start)
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


def _two_sides(
    store: TokenStore, rows: Sequence[Sequence[int]], pad_token_id: int, decoder_start: int
) -> MicroBatch:
    """As ``collate``, for an encoder-decoder model."""
    assert all(len(row) <= 1 for row in rows), "an encoder reads one example a row"
    examples = [row[0] if row else None for row in rows]
    prompts, completions = [], []
    for example in examples:
        ids = np.zeros(0, dtype=np.int64) if example is None else store.input_ids(example)
        start = 0 if example is None else int(store.target_starts[example])
        prompts.append(ids[:start])
        completions.append(ids[start:])
    encoder_ids, labels = _padded(prompts, pad_token_id), _padded(completions, IGNORED)
    reads = [np.append(decoder_start, ids[:-1]) if len(ids) else ids for ids in completions]
    decoder_ids = _padded(reads, pad_token_id)
    mask = _padded([np.ones(max(1, len(ids))) for ids in prompts], 0)
    lengths = [len(prompt) for prompt in prompts], [len(completion) for completion in completions]
    encoder_examples, decoder_examples = (_spread(examples, of_side) for of_side in lengths)
    domains = [None if example is None else int(store.domain_ids[example]) for example in examples]
    encoder_domains, decoder_domains = (_spread(domains, of_side) for of_side in lengths)
    return MicroBatch(
        decoder_ids,
        labels,
        torch.arange(labels.shape[1]).expand(labels.shape).contiguous(),
        decoder_domains,
        decoder_examples,
        num_tokens=sum(map(sum, lengths)),
        num_targets=sum(lengths[1]),
        encoder=EncoderRows(encoder_ids, mask, encoder_domains, encoder_examples),
    )


def _padded(rows: Sequence[np.ndarray], filler: int) -> torch.Tensor:
    """Rows of unlike lengths as int64 ``[B, S]``, filled up on the right."""
    found = np.full((len(rows), max(1, *map(len, rows))), filler, dtype=np.int64)
    for b, row in enumerate(rows):
        found[b, : len(row)] = row
    return torch.from_numpy(found)


def _spread(values: Sequence[int | None], lengths: Sequence[int]) -> torch.Tensor:
    """A number a row on each of its tokens, ``PADDING`` behind them."""
    return _padded([np.full(n, value or 0) for value, n in zip(values, lengths, strict=True)], PADDING)


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
    in_encoder = 0 if store.decoder_start is None else int(store.target_starts[examples].sum())
    real_tokens = int(store.lengths[examples].sum())
    return StepBatch(micro_batches, torch.from_numpy(targets), real_tokens, in_encoder)
