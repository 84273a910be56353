"""Which examples make up each optimizer step: a function of the seed and the step alone."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from dsmixer.data.packing import pack
from dsmixer.data.seeds import generator
from dsmixer.data.store import TokenStore
from dsmixer.placement.owners import Slots, pack_slots

EPOCHS_IN_MEMORY = 2
FOLLOWING = ("slots", "first_epoch")
"""Of a cursor: what follows from the rest, if nothing else shuffles otherwise."""

ROWS_A_SLOT = 4
"""Least rows of a slot in an epoch: the last row of each is filled in part only."""


class StepSampler:
    """The rows of every optimizer step, the same whatever the world size.

    An epoch sees an example of a domain with weight w on average w times: the domain's examples come from
    passes over it, each shuffled anew, ``round(w * n)`` an epoch, going on in the next epoch where this one
    stopped.

    In stage one experts are laid out over slots of about equal load (``placement.owners``), and each step
    draws as many rows from every slot, so that a rank that owns slots is fed its own experts' domains alone.
    In stage two there is one slot for all. A slot's examples of an epoch are shuffled together and, with
    packing, packed into rows. Packing makes the number of rows differ from epoch to epoch; the rows of a
    slot's epochs follow each other without a gap, and a slot that has come to its end gives empty rows.

    Args:
        store: the tokenised examples.
        weights: one weight a domain, positive.
        max_length: tokens a row holds.
        packing: whether rows hold several examples.
        global_batch_size: rows a step, over all ranks and micro-batches.
        epochs: epochs to run, if ``max_steps`` does not say otherwise.
        max_steps: optimizer steps to run, through as many epochs as they need; None: what the epochs take.
        seed: the run's seed.
        experts: expert of each domain, from 0; None: one slot for all domains.
        num_experts: E, where ``experts`` is given.

    Attributes:
        num_steps: optimizer steps to run.
        num_domains: number of domains.
        slots: of the experts.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        weights: Sequence[float],
        max_length: int,
        packing: bool,
        global_batch_size: int,
        epochs: int,
        max_steps: int | None,
        seed: int,
        experts: Sequence[int] | None = None,
        num_experts: int = 1,
    ) -> None:
        assert len(store) and global_batch_size > 0 and epochs > 0 and min(weights) > 0
        self._store = store
        self._max_length = max_length
        self._packing = packing
        self._seed = seed
        self.global_batch_size = global_batch_size
        self.num_domains = len(weights)
        self._members = [np.flatnonzero(store.domain_ids == d) for d in range(self.num_domains)]
        assert sum(map(len, self._members)) == len(store), "an example has a domain without a weight"
        self._draws = [
            max(1, int(weight * len(members) + 0.5)) if len(members) else 0
            for weight, members in zip(weights, self._members, strict=True)
        ]
        self._weights = [float(weight) for weight in weights]
        self._domains_of: list[list[int]] = [[] for _ in range(num_experts)]
        for domain, expert in enumerate([0] * self.num_domains if experts is None else experts):
            self._domains_of[expert].append(domain)
        self._expert_examples = lru_cache(maxsize=EPOCHS_IN_MEMORY * num_experts)(self._examples_of_expert)
        self.slots = self._packed_slots() if experts is not None else pack_slots([1.0], 1)
        self._streams = [
            _Stream(partial(self._rows_of_epoch, slot), None if max_steps else epochs)
            for slot in range(len(self.slots))
        ]
        self._rows_a_slot = global_batch_size // len(self.slots)
        self.num_steps = max_steps or max(
            -(-stream.before(epochs) // self._rows_a_slot) for stream in self._streams
        )

    def rows(self, step: int) -> list[tuple[int, ...]]:
        """The step's rows as tuples of example indices.

        Args:
            step: the step's number from 0, below ``num_steps``.

        Returns:
            ``global_batch_size`` rows, as many of each slot and in the order of the slots; those of a slot
            that has come to its end are empty.
        """
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        count = self._rows_a_slot
        return [row for stream in self._streams for row in stream.rows(step * count, count)]

    def state(self, step: int) -> dict[str, Any]:
        """The cursor to save: the number of the next step to run, and what decides the order of the data."""
        return {"step": step, **self._order}

    def differences(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """How the data and their order differ from those of a saved cursor, ``NAME: OLD there, NEW here``.

        What follows from the data and the settings is named only where they do not explain it.
        """
        others = [name for name, value in self._order.items() if state.get(name) != value]
        told = [name for name in others if name not in FOLLOWING] or others
        return tuple(
            f"{name}: {_short(state.get(name))} there, {_short(self._order[name])} here" for name in told
        )

    @cached_property
    def _order(self) -> dict[str, Any]:
        data = hashlib.sha256(self._store.fingerprint.encode() + self._store.domain_ids.tobytes())
        first = [stream.epoch(0) for stream in self._streams]
        return {
            "seed": self._seed,
            "max_length": self._max_length,
            "packing": self._packing,
            "global_batch_size": self.global_batch_size,
            "weights": self._weights,
            "examples": len(self._store),
            "slots": len(self.slots),
            "data": data.hexdigest()[:32],
            # The order itself too: another version of numpy may shuffle otherwise.
            "first_epoch": hashlib.sha256(repr(first).encode()).hexdigest()[:32],
        }

    def _packed_slots(self) -> Slots:
        loads = [self._num_rows(self._expert_examples(e, 0)) for e in range(len(self._domains_of))]
        divisors = [n for n in range(1, self.global_batch_size + 1) if self.global_batch_size % n == 0]
        filled = [n for n in divisors if n * ROWS_A_SLOT <= sum(loads)]
        return pack_slots(loads, max(filled, default=1))

    def _num_rows(self, examples: np.ndarray) -> float:
        """Rows that examples fill by themselves, the last one by its tokens."""
        if not self._packing or not len(examples):
            return float(len(examples))
        rows = pack(self._store.lengths, examples, self._max_length)
        return len(rows) - 1 + float(self._store.lengths[list(rows[-1])].sum()) / self._max_length

    def _rows_of_epoch(self, slot: int, epoch: int) -> list[tuple[int, ...]]:
        drawn = []
        for expert, start, stop in self.slots.parts[slot]:
            examples = self._expert_examples(expert, epoch)
            drawn.append(examples[round(start * len(examples)) : round(stop * len(examples))])
        order = generator(self._seed, "epoch", epoch, "slot", slot).permutation(np.concatenate(drawn))
        if not self._packing:
            return [(example,) for example in order.tolist()]
        return pack(self._store.lengths, order, self._max_length)

    def _examples_of_expert(self, expert: int, epoch: int) -> np.ndarray:
        """The epoch's examples of all domains of an expert, shuffled, as several slots may share them."""
        drawn = [self._drawn(domain, epoch) for domain in self._domains_of[expert]]
        if not drawn:
            return np.zeros(0, dtype=np.int64)
        return generator(self._seed, "expert", expert, epoch).permutation(np.concatenate(drawn))

    def _drawn(self, domain: int, epoch: int) -> np.ndarray:
        """The epoch's part of the endless sequence of shuffled passes over a domain."""
        members, draws = self._members[domain], self._draws[domain]
        if not draws:
            return members
        first, stop = epoch * draws, (epoch + 1) * draws
        begin = first // len(members)
        passes = [
            generator(self._seed, "pass", domain, number).permutation(members)
            for number in range(begin, -(-stop // len(members)))
        ]
        offset = begin * len(members)
        return np.concatenate(passes)[first - offset : stop - offset]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


class _Stream:
    """The rows of one slot, epoch after epoch.

    Args:
        rows_of_epoch: the rows of an epoch, by its number.
        num_epochs: after which only empty rows come; None: never.
    """

    def __init__(self, rows_of_epoch: Callable[[int], list[tuple[int, ...]]], num_epochs: int | None) -> None:
        self.epoch = lru_cache(maxsize=EPOCHS_IN_MEMORY)(rows_of_epoch)
        self._num_epochs = num_epochs
        self._ends = [0]

    def rows(self, first: int, count: int) -> list[tuple[int, ...]]:
        """``count`` rows from row ``first`` of the whole run on, empty ones behind the end."""
        rows: list[tuple[int, ...]] = []
        epoch = self._epoch_of(first)
        while len(rows) < count and epoch != self._num_epochs:
            start = first + len(rows) - self.before(epoch)
            rows += self.epoch(epoch)[start : start + count - len(rows)]
            epoch += 1
        return rows + [()] * (count - len(rows))

    def before(self, epoch: int) -> int:
        """The number of rows in all epochs before this one."""
        while len(self._ends) <= epoch:
            rows = len(self.epoch(len(self._ends) - 1))
            assert rows or self._num_epochs is not None, "a slot without rows"
            self._ends.append(self._ends[-1] + rows)
        return self._ends[epoch]

    def _epoch_of(self, row: int) -> int:
        """The epoch that holds a row of the whole run."""
        while self._ends[-1] <= row and len(self._ends) - 1 != self._num_epochs:
            self.before(len(self._ends))
        return bisect_right(self._ends, row) - 1
