"""A checkpoint of any layout of any pool, read into any other layout."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.partitions import FakePool, FakeRanks, load_fake, save_fake

from dsmixer.checkpoint.restore import SavedCheckpoint
from dsmixer.checkpoint.schema import KINDS
from dsmixer.checkpoint.verify import damage

shares = st.lists(st.floats(0, 1), min_size=8, max_size=8).map(tuple)


@st.composite
def owners(draw: st.DrawFn, num_experts: int) -> tuple[tuple[int, ...], ...]:
    """Each expert at one place at least, some at several, and no place without one."""
    size = draw(st.integers(1, min(4, num_experts)))
    places: list[list[int]] = [[] for _ in range(size)]
    for expert in range(num_experts):
        first = expert if expert < size else draw(st.integers(0, size - 1))
        held = {first, *draw(st.sets(st.integers(0, size - 1), max_size=2))}
        for place in held:
            places[place].append(expert)
    return tuple(tuple(draw(st.permutations(place))) for place in places)


@st.composite
def layouts(draw: st.DrawFn, num_experts: int) -> FakeRanks:
    """ZeRO-0, or a spread with partitions cut anywhere, also where they leave a rank without anything."""
    if draw(st.booleans()):
        return FakeRanks((tuple(range(num_experts)),), draw(st.integers(1, 4)))
    return FakeRanks(draw(owners(num_experts)), draw(st.integers(1, 3)), draw(shares))


@st.composite
def cases(draw: st.DrawFn) -> tuple[FakePool, FakeRanks, FakeRanks, int]:
    num_experts = draw(st.integers(1, 7))
    shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3))
    pool = FakePool(num_experts, tuple(shapes))
    bounds = st.sampled_from([16, 100, 1000, 2**20])
    return pool, draw(layouts(num_experts)), draw(layouts(num_experts)), draw(bounds)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_saving_in_one_layout_and_reading_in_another_is_the_identity(
    case: tuple[FakePool, FakeRanks, FakeRanks, int],
) -> None:
    """Every kind, every element of every shard of every rank; and the whole tensors."""
    pool, before, after, file_bytes = case
    with tempfile.TemporaryDirectory() as folder:
        path = save_fake(Path(folder), pool, before, 3, file_bytes=file_bytes)
        assert damage(path) is None
        tensors = sum(p.stat().st_size for p in path.glob("*.safetensors"))
        assert tensors >= 4 * len(KINDS) * sum(t.numel() for t in pool.whole("weights").values())
        saved = SavedCheckpoint(path)
        for kind in KINDS:
            whole = saved.whole(kind)
            assert whole.keys() == pool.whole(kind).keys()
            assert all(torch.equal(whole[name], tensor) for name, tensor in pool.whole(kind).items())
            for rank in range(after.size):
                wanted = after.shards(pool, rank, kind)
                found = load_fake(saved, pool, after, rank, kind)
                for ours, theirs in zip(found, wanted, strict=True):
                    assert torch.equal(ours.weights.nan_to_num(-1.0), theirs.weights.nan_to_num(-1.0))


def test_a_file_is_never_larger_than_its_bound_but_for_its_header(tmp_path: Path) -> None:
    """An expert larger than a file is cut; small ones share a file."""
    pool, ranks = FakePool(3, ((4, 50), (1, 2))), FakeRanks(((0, 1, 2),), 2, (0.5,) * 8)
    path = save_fake(tmp_path, pool, ranks, 1, file_bytes=320)
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    header = 1200
    assert max(sizes) <= 320 + header and len(sizes) > 10
    whole = SavedCheckpoint(path).whole("exp_avg")
    assert all(torch.equal(whole[name], tensor) for name, tensor in pool.whole("exp_avg").items())


def test_each_element_is_written_once_whatever_the_owners(tmp_path: Path) -> None:
    pool = FakePool(3, ((2, 4),))
    for owned, replicas, cuts in ((((0, 1, 2),), 3, ()), (((0, 1), (0, 2)), 2, (0.3,) * 8)):
        path = save_fake(tmp_path, pool, FakeRanks(owned, replicas, cuts), 1)
        saved = SavedCheckpoint(path)
        written = sum(run.numel for runs in saved._runs.values() for run in runs)
        assert written == sum(tensor.numel() for tensor in pool.whole("weights").values())


def test_a_small_tensor_of_rank_0_comes_back(tmp_path: Path) -> None:
    pool, usage = FakePool(2, ((1, 3),)), torch.rand(1, 2)
    path = save_fake(tmp_path, pool, FakeRanks(((0, 1),), 2), 1, small={"usage": usage})
    found = SavedCheckpoint(path).small("usage")
    assert found is not None and torch.equal(found, usage)
    assert SavedCheckpoint(save_fake(tmp_path, pool, FakeRanks(((0, 1),), 2), 2)).small("usage") is None
