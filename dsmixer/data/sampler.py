"""Which examples make up each optimizer step: a function of the seed and the step alone."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from dsmixer.config.errors import UserError
from dsmixer.data.packing import pack
from dsmixer.data.seeds import generator
from dsmixer.data.store import TokenStore

EPOCHS_IN_MEMORY = 2


class StepSampler:
    """The rows of every optimizer step, the same whatever the world size.

    An epoch sees an example of a domain with weight w on average w times: the domain's examples come from
    passes over it, each shuffled anew, ``round(w * n)`` an epoch, going on in the next epoch where this one
    stopped. The epoch's examples of all domains are shuffled together and, with packing, packed into rows.
    Packing makes the number of rows differ from epoch to epoch; the rows of the epochs follow each other
    without a gap, and only the very last step is filled up with empty rows.

    Args:
        store: the tokenised examples.
        weights: one weight a domain, positive.
        max_length: tokens a row holds.
        packing: whether rows hold several examples.
        global_batch_size: rows a step, over all ranks and micro-batches.
        epochs: epochs to run, if ``max_steps`` does not say otherwise.
        max_steps: optimizer steps to run, through as many epochs as they need; None: what the epochs take.
        seed: the run's seed.

    Attributes:
        num_steps: optimizer steps to run.
        num_domains: number of domains.
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
        self._num_epochs = None if max_steps else epochs
        self._epoch_rows = lru_cache(maxsize=EPOCHS_IN_MEMORY)(self._rows_of_epoch)
        self._ends = [0]
        self.num_steps = max_steps or -(-self._rows_before(epochs) // global_batch_size)

    def rows(self, step: int) -> list[tuple[int, ...]]:
        """The step's rows as tuples of example indices.

        Args:
            step: the step's number from 0, below ``num_steps``.

        Returns:
            ``global_batch_size`` rows; in the last step of the last epoch the last ones may be empty.
        """
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        first = step * self.global_batch_size
        rows: list[tuple[int, ...]] = []
        epoch = self._epoch_of(first)
        while len(rows) < self.global_batch_size and epoch != self._num_epochs:
            start = first + len(rows) - self._rows_before(epoch)
            rows += self._epoch_rows(epoch)[start : start + self.global_batch_size - len(rows)]
            epoch += 1
        return rows + [()] * (self.global_batch_size - len(rows))

    def state(self, step: int) -> dict[str, Any]:
        """The cursor to save: the number of the next step to run, and what decides the order of the data."""
        return {"step": step, **self._order}

    def check(self, state: Mapping[str, Any]) -> int:
        """The step to go on with.

        Raises:
            UserError: the cursor was saved over other data or in another order; names what differs.
        """
        for name, value in self._order.items():
            if state.get(name) != value:
                problem = f"other data or another order: {name} was {state.get(name)!r}, is {value!r}"
                raise UserError(
                    problem, where="data cursor", fix="restore the data and settings, or start a new run"
                )
        return int(state["step"])

    @cached_property
    def _order(self) -> dict[str, Any]:
        data = hashlib.sha256(self._store.fingerprint.encode() + self._store.domain_ids.tobytes())
        return {
            "seed": self._seed,
            "max_length": self._max_length,
            "packing": self._packing,
            "global_batch_size": self.global_batch_size,
            "weights": self._weights,
            "examples": len(self._store),
            "data": data.hexdigest()[:32],
            # The order itself too: another version of numpy may shuffle otherwise.
            "first_epoch": hashlib.sha256(repr(self._epoch_rows(0)).encode()).hexdigest()[:32],
        }

    def _epoch_of(self, row: int) -> int:
        """The epoch that holds a row of the whole run."""
        while self._ends[-1] <= row and len(self._ends) - 1 != self._num_epochs:
            self._rows_before(len(self._ends))
        return bisect_right(self._ends, row) - 1

    def _rows_before(self, epoch: int) -> int:
        """The number of rows in all epochs before this one."""
        while len(self._ends) <= epoch:
            done = len(self._ends) - 1
            rows = len(self._epoch_rows(done)) if self._packing else sum(self._draws)
            self._ends.append(self._ends[-1] + rows)
        return self._ends[epoch]

    def _rows_of_epoch(self, epoch: int) -> list[tuple[int, ...]]:
        drawn = np.concatenate([self._drawn(domain, epoch) for domain in range(self.num_domains)])
        order = generator(self._seed, "epoch", epoch).permutation(drawn)
        if not self._packing:
            return [(example,) for example in order.tolist()]
        return pack(self._store.lengths, order, self._max_length)

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
