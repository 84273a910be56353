"""The order of the data: every example as often as its weight says, whatever the world size."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dsmixer.data.collate import step_batch
from dsmixer.data.sampler import StepSampler
from dsmixer.data.store import TokenStore
from dsmixer.placement.owners import owners_of

LENGTHS = np.random.default_rng(1).integers(2, 30, 60).tolist()
DOMAINS = [0] * 30 + [1] * 20 + [2] * 10


@pytest.fixture(scope="module")
def store(make_store: Callable[..., TokenStore]) -> TokenStore:
    return make_store(LENGTHS, DOMAINS)


def sampler_of(store: TokenStore, **how: Any) -> StepSampler:
    how = {
        "weights": [1.0, 1.0, 1.0],
        "max_length": 32,
        "packing": True,
        "global_batch_size": 8,
        "epochs": 1,
        "max_steps": None,
        "seed": 0,
        **how,
    }
    return StepSampler(store, **how)


def all_rows(sampler: StepSampler) -> list[tuple[int, ...]]:
    return [row for step in range(sampler.num_steps) for row in sampler.rows(step)]


def seen(sampler: StepSampler) -> Counter[int]:
    return Counter(example for row in all_rows(sampler) for example in row)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_example_is_seen_once_an_epoch_and_only_the_last_step_has_empty_rows(
    store: TokenStore, packing: bool, epochs: int
) -> None:
    sampler = sampler_of(store, packing=packing, epochs=epochs)
    assert seen(sampler) == Counter(dict.fromkeys(range(60), epochs))
    rows = all_rows(sampler)
    assert len(rows) == 8 * sampler.num_steps
    empty = [i for i, row in enumerate(rows) if not row]
    assert empty == list(range(len(rows) - len(empty), len(rows))) and len(empty) < 8
    assert all(sum(LENGTHS[i] for i in row) <= 32 for row in rows)
    if not packing:
        assert sampler.num_steps == -(-60 * epochs // 8) and max(map(len, rows)) == 1


def test_rows_are_a_function_of_the_seed_and_the_step(store: TokenStore) -> None:
    one, other = sampler_of(store, epochs=4), sampler_of(store, epochs=4)
    steps = list(range(one.num_steps))
    forward = {step: one.rows(step) for step in steps}
    assert {step: other.rows(step) for step in reversed(steps)} == forward
    assert sampler_of(store, epochs=4, seed=1).rows(0) != forward[0]
    assert Counter(forward[0]) != Counter(one.rows(steps[-2])), "each epoch has an order of its own"


@pytest.mark.parametrize("packing", [True, False])
def test_max_steps_cuts_an_epoch_short_or_goes_on_with_further_epochs(
    store: TokenStore, packing: bool
) -> None:
    epoch = sampler_of(store, packing=packing)
    short = sampler_of(store, packing=packing, max_steps=2)
    assert short.num_steps == 2 and [short.rows(s) for s in (0, 1)] == [epoch.rows(s) for s in (0, 1)]
    long = sampler_of(store, packing=packing, max_steps=50)
    rows = all_rows(long)
    assert long.num_steps == 50 and len(rows) == 400 and all(rows)
    counts = seen(long).values()
    assert max(counts) - min(counts) <= 1 and min(counts) >= 2
    many_epochs = sampler_of(store, packing=packing, epochs=5)
    assert many_epochs.rows(15) == long.rows(15)


def test_weights_decide_how_often_a_domain_is_seen_and_passes_go_on_across_epochs(store: TokenStore) -> None:
    weights = [0.5, 1.0, 2.5]
    once = seen(sampler_of(store, weights=weights))
    assert [sum(once[i] for i in range(60) if DOMAINS[i] == d) for d in range(3)] == [15, 20, 25]
    assert {once[i] for i in range(30)} == {0, 1} and {once[i] for i in range(50, 60)} == {2, 3}
    twice = seen(sampler_of(store, weights=weights, epochs=2))
    assert [twice[i] for i in range(60)] == [1] * 30 + [2] * 20 + [5] * 10
    tiny = seen(sampler_of(store, weights=[1e-6, 1.0, 1.0]))
    assert sum(tiny[i] for i in range(30)) == 1, "a domain is never left out"


def test_domains_are_mixed_within_an_epoch(store: TokenStore) -> None:
    sampler = sampler_of(store, packing=False)
    halves = [
        [DOMAINS[i] for step in steps for (i,) in sampler.rows(step)] for steps in (range(4), range(4, 7))
    ]
    assert all(set(half) == {0, 1, 2} for half in halves)


def test_each_epoch_mixes_the_domains_anew(store: TokenStore) -> None:
    rows = all_rows(sampler_of(store, packing=False, epochs=2))[:120]
    order = [DOMAINS[example] for (example,) in rows]
    assert order[:60] != order[60:] and sorted(order[:60]) == sorted(order[60:])


@pytest.mark.parametrize("packing", [True, False])
def test_the_rows_and_counts_of_a_step_do_not_depend_on_the_world_size(
    store: TokenStore, packing: bool
) -> None:
    sampler = sampler_of(store, packing=packing)
    for step in range(sampler.num_steps):
        layouts = []
        for world_size, micro_batch_size in ((1, 8), (1, 1), (2, 2), (4, 2), (4, 1)):
            shares = [
                step_batch(
                    sampler,
                    store,
                    step,
                    world_rank=rank,
                    world_size=world_size,
                    micro_batch_size=micro_batch_size,
                    pad_token_id=0,
                )
                for rank in range(world_size)
            ]
            micro_batches = [micro for share in shares for micro in share.micro_batches]
            assert {len(share.micro_batches) for share in shares} == {8 // world_size // micro_batch_size}
            rows = [
                tuple(dict.fromkeys(ids[ids >= 0].tolist())) for m in micro_batches for ids in m.example_ids
            ]
            counted = {(tuple(share.target_tokens.tolist()), share.real_tokens) for share in shares}
            assert len(counted) == 1, "every rank knows the whole step's counts"
            layouts.append((rows, counted))
            assert sum(m.num_tokens for m in micro_batches) == shares[0].real_tokens
            assert sum(m.num_targets for m in micro_batches) == int(shares[0].target_tokens.sum())
        assert all(layout == layouts[0] for layout in layouts)
        assert layouts[0][0] == sampler.rows(step)


EXPERT_OF_DOMAIN = [1, 0, 1]


@pytest.fixture(scope="module")
def large_store(make_store: Callable[..., TokenStore]) -> TokenStore:
    """Three quarters of all examples in one of three domains."""
    lengths = np.random.default_rng(2).integers(2, 30, 800).tolist()
    return make_store(lengths, [0] * 600 + [1] * 130 + [2] * 70)


def slotted(store: TokenStore, **how: Any) -> StepSampler:
    return sampler_of(store, **{"experts": EXPERT_OF_DOMAIN, "num_experts": 2, **how})


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epochs", [1, 2])
def test_slots_see_every_example_once_an_epoch_and_end_together(
    large_store: TokenStore, packing: bool, epochs: int
) -> None:
    sampler = slotted(large_store, packing=packing, epochs=epochs)
    assert len(sampler.slots) == 8
    assert seen(sampler) == Counter(dict.fromkeys(range(800), epochs))
    rows = np.array([[len(row) for row in sampler.rows(step)] for step in range(sampler.num_steps)])
    given = (rows > 0).sum(0)
    assert given.min() >= 0.85 * given.max(), "no slot ends long before the others"
    for slot in range(8):
        assert (rows[: given[slot], slot] > 0).all(), "empty rows come last"


@pytest.mark.parametrize(
    ("world_size", "expert_parallel_size"),
    [(world, ep) for world in (1, 2, 4, 8) for ep in (1, 2, 4, 8) if ep <= world],
)
def test_every_row_is_on_a_rank_that_owns_the_experts_of_its_tokens(
    large_store: TokenStore, world_size: int, expert_parallel_size: int
) -> None:
    sampler = slotted(large_store)
    owners = owners_of(sampler.slots, expert_parallel_size)
    expert_of = np.array(EXPERT_OF_DOMAIN)
    for step in range(0, sampler.num_steps, 5):
        rows = []
        for rank in range(world_size):
            batch = step_batch(
                sampler,
                large_store,
                step,
                world_rank=rank,
                world_size=world_size,
                micro_batch_size=1,
                pad_token_id=0,
                expert_parallel_size=expert_parallel_size,
            )
            held = set(owners.held(rank % expert_parallel_size))
            for micro in batch.micro_batches:
                domains = micro.domain_ids[micro.domain_ids >= 0].numpy()
                assert set(expert_of[domains].tolist()) <= held
                rows.append(tuple(dict.fromkeys(micro.example_ids[micro.example_ids >= 0].tolist())))
        assert Counter(rows) == Counter(sampler.rows(step)), "all ranks together see the step's rows"


def test_a_slot_that_lies_across_ranks_is_owned_by_both(make_store: Callable[..., TokenStore]) -> None:
    store = make_store([20] * 40, [0] * 22 + [1] * 18)
    sampler = sampler_of(store, weights=[1, 1], experts=[0, 1], num_experts=2, global_batch_size=64)
    assert len(sampler.slots) == 8 < 64
    sampler = sampler_of(store, weights=[1, 1], experts=[0, 1], num_experts=2, global_batch_size=9)
    assert len(sampler.slots) == 9
    owners = owners_of(sampler.slots, 2)
    assert set(owners.held(0)) | set(owners.held(1)) == {0, 1} and owners.several()


def test_few_rows_make_few_slots_so_that_rows_are_full(store: TokenStore) -> None:
    sampler = sampler_of(store, experts=[0, 1, 2], num_experts=3, global_batch_size=64)
    assert len(sampler.slots) == 8 and seen(sampler) == Counter(dict.fromkeys(range(60), 1))
    assert sum(LENGTHS) / (32 * sum(map(bool, all_rows(sampler)))) > 0.75, "of the places are filled"


def test_a_skewed_pool_keeps_the_busiest_rank_within_ten_percent(
    make_store: Callable[..., TokenStore],
) -> None:
    """A domain with 60 % of the tokens among six, on four ranks, averaged over the steps of stage one."""
    lengths = np.random.default_rng(3).integers(4, 30, 5000).tolist()
    domains = np.repeat(range(6), [3000, 400, 400, 400, 400, 400])
    store = make_store(lengths, domains.tolist())
    sampler = sampler_of(
        store, weights=[1.0] * 6, experts=list(range(6)), num_experts=6, global_batch_size=16, max_steps=50
    )
    tokens = np.zeros(4)
    for step in range(sampler.num_steps):
        for slot, row in enumerate(sampler.rows(step)):
            tokens[slot // 4] += sum(lengths[i] for i in row)
    assert tokens.max() / tokens.mean() < 1.10
    share = np.bincount(domains, weights=lengths) / sum(lengths) * 4
    without = [share[0], share[1] + share[2], share[3] + share[4], share[5]]  # one owner each
    assert max(without) > 2.3


def test_target_tokens_are_counted_by_domain(make_store: Callable[..., TokenStore]) -> None:
    store = make_store([5, 7, 4], [2, 0, 2], target_starts=[3, 1, 2])
    sampler = sampler_of(store, global_batch_size=4)
    batch = step_batch(sampler, store, 0, world_rank=1, world_size=2, micro_batch_size=1, pad_token_id=0)
    assert batch.target_tokens.tolist() == [6, 0, 4] and batch.real_tokens == 16


def test_a_cursor_goes_through_json_and_is_known_again(store: TokenStore) -> None:
    saved = json.loads(json.dumps(sampler_of(store).state(3)))
    assert saved["step"] == 3
    assert sampler_of(store).differences(saved) == ()
    assert sampler_of(store, epochs=2).differences(saved) == (), (
        "a longer run goes through the same rows first"
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"packing": False}, "packing: True there, False here"),
        ({"global_batch_size": 4}, "global_batch_size: 8 there, 4 here"),
        ({"weights": [1.0, 1.0, 2.0]}, "weights: "),
        ({"max_length": 64}, "max_length: 32 there, 64 here"),
    ],
)
def test_what_orders_the_data_otherwise_is_named(
    store: TokenStore, change: dict[str, Any], named: str
) -> None:
    (line,) = sampler_of(store, **change).differences(sampler_of(store).state(3))
    assert line.startswith(named), "and not what follows from it"


def test_other_data_are_told_by_their_digest(store: TokenStore) -> None:
    saved = sampler_of(store).state(3)
    for other in (
        dataclasses.replace(store, fingerprint="other texts"),
        dataclasses.replace(store, domain_ids=np.array(DOMAINS[::-1], dtype=np.int64)),
    ):
        (line,) = sampler_of(other).differences(saved)
        assert line.startswith(f"data: {saved['data'][:12]} there, ")
    (line,) = sampler_of(store).differences({**saved, "first_epoch": "another shuffle"})
    assert line.startswith("first_epoch: another shuf there, ")
