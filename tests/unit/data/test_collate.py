"""The tensors of a micro-batch, written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsmixer.data.collate import collate
from dsmixer.data.store import TokenStore


@pytest.fixture(scope="module")
def store(make_store: Callable[..., TokenStore]) -> TokenStore:
    return make_store([3, 2, 4], [5, 0, 1], target_starts=[1, 1, 2])


def test_a_packed_an_unpacked_and_an_empty_row(store: TokenStore) -> None:
    batch = collate(store, [(0, 1), (2,), ()], pad_token_id=77)
    a, b, c = (store.input_ids(i).tolist() for i in range(3))
    assert batch.input_ids.tolist() == [[*a, *b], [*c, 77], [77] * 5]
    assert batch.labels.tolist() == [
        [-100, *a[1:], -100, b[1]],
        [-100, -100, *c[2:], -100],
        [-100] * 5,
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
    assert batch.domain_ids.tolist() == [[5, 5, 5, 0, 0], [1, 1, 1, 1, -1], [-1] * 5]
    assert batch.example_ids.tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, -1], [-1] * 5]
    assert batch.num_tokens == 9 and batch.num_targets == 5 == int((batch.labels != -100).sum())
    for tensor in (batch.input_ids, batch.labels, batch.position_ids, batch.domain_ids, batch.example_ids):
        assert tensor.dtype == torch.int64 and tensor.is_contiguous()


def test_rows_are_as_long_as_the_longest_and_at_least_one_token(store: TokenStore) -> None:
    assert collate(store, [(1,)], 0).input_ids.shape == (1, 2)
    empty = collate(store, [(), ()], 9)
    assert empty.input_ids.tolist() == [[9], [9]] and empty.num_tokens == empty.num_targets == 0


def test_flat_is_one_row_of_the_same_tokens_with_restarting_positions(store: TokenStore) -> None:
    batch = collate(store, [(0,), (2,)], 0)
    flat = batch.flat()
    assert flat.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert flat.input_ids.flatten().equal(batch.input_ids.flatten()) and flat.num_targets == batch.num_targets


def test_a_batch_goes_to_a_device_whole(store: TokenStore) -> None:
    moved = collate(store, [(0,)], 0).to("meta")
    assert {moved.input_ids.device.type, moved.labels.device.type, moved.example_ids.device.type} == {"meta"}
    assert moved.num_tokens == 3
