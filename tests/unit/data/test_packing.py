"""Rows hold every example once, none too long, and little padding."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsmixer.data.packing import OPEN_ROWS, pack


@given(lengths=st.lists(st.integers(1, 50), max_size=300), more=st.integers(0, 50), seed=st.integers(0, 9))
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths: list[int], more: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = pack(np.array(lengths, dtype=np.int64), order, 50 + more)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= 50 + more for row in rows)
    assert rows == pack(np.array(lengths, dtype=np.int64), order, 50 + more)


@given(lengths=st.lists(st.integers(1, 20), max_size=OPEN_ROWS))
def test_as_long_as_no_row_is_closed_it_is_the_textbooks_first_fit(lengths: list[int]) -> None:
    rows: list[list[int]] = []
    for i, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[j] for j in row) + length <= 20:
                row.append(i)
                break
        else:
            rows.append([i])
    packed = pack(np.array(lengths, dtype=np.int64), range(len(lengths)), 20)
    assert sorted(packed) == sorted(tuple(row) for row in rows)


def test_an_example_may_be_packed_more_than_once() -> None:
    assert pack(np.array([3, 4]), [1, 1, 0], 7) == [(1, 0), (1,)]


def test_rows_of_mixed_lengths_are_nearly_full() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 400, 5000)
    rows = pack(lengths, random.permutation(5000), 1024)
    assert lengths.sum() / (len(rows) * 1024) > 0.97
