"""Batches made ahead of their steps."""

from __future__ import annotations

import threading

import pytest
import torch

from dsmixer.data.collate import StepBatch
from dsmixer.training.ahead import Ahead


class Batches:
    """Batches that tell their step by their real tokens; which steps were made, and in which threads."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.made, self.threads = fails_at, list[int](), set[str]()
        self.begun = {step: threading.Event() for step in range(10)}

    def __call__(self, step: int) -> StepBatch:
        self.made.append(step)
        self.threads.add(threading.current_thread().name)
        self.begun[step].set()
        if step == self.fails_at:
            raise RuntimeError(f"step {step} is broken")
        return StepBatch([], torch.zeros(2, dtype=torch.int64), real_tokens=step)


def test_every_step_gets_its_own_batch_and_the_next_is_made_beside_it() -> None:
    batches = Batches()
    with Ahead(batches, 4, "cpu") as ahead:
        for step in range(4):
            assert ahead(step).real_tokens == step
            if step + 1 < 4:
                assert batches.begun[step + 1].wait(timeout=10), "nobody asked for it yet"
    assert batches.made == [0, 1, 2, 3], "none is made twice, and none behind the last"
    assert all(name.startswith("next batch") for name in batches.threads)


def test_it_begins_anywhere_and_goes_back() -> None:
    with Ahead(Batches(), 9, "cpu") as ahead:
        assert [ahead(step).real_tokens for step in (5, 6, 2, 3, 8)] == [5, 6, 2, 3, 8]


def test_a_broken_batch_is_told_at_its_own_step() -> None:
    with Ahead(Batches(fails_at=2), 4, "cpu") as ahead:
        assert ahead(0).real_tokens == 0
        assert ahead(1).real_tokens == 1
        with pytest.raises(RuntimeError, match="step 2 is broken"):
            ahead(2)


def test_no_thread_is_left() -> None:
    with Ahead(Batches(), 4, "cpu") as ahead:
        ahead(0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("next batch")]
