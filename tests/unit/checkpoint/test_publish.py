"""What stays on disk: interrupted and abandoned saves, retention, space."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.partitions import FakePool, FakeRanks, fake_state, save_fake

from dsmixer.checkpoint import atomic
from dsmixer.checkpoint.publish import (
    abandon_save,
    begin_save,
    building_folder,
    check_space,
    clear_unfinished,
    drop_old,
    finish_save,
    list_checkpoints,
)
from dsmixer.checkpoint.retention import Retention, no_longer_kept
from dsmixer.checkpoint.verify import damage

POOL, RANKS = FakePool(2, ((1, 3),)), FakeRanks(((0, 1),), 1)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_interrupted_save_is_no_checkpoint_and_goes_with_the_next_save(tmp_path: Path) -> None:
    save_fake(tmp_path, POOL, RANKS, 3)
    begin_save(tmp_path, 6, 0)
    (building_folder(tmp_path, 6) / "rank-00000-000.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    save_fake(tmp_path, POOL, RANKS, 9)
    assert names(tmp_path) == ["step-00000003", "step-00000009"]


def test_what_a_kill_has_left_is_named_when_it_is_cleared(tmp_path: Path) -> None:
    begin_save(tmp_path, 6, 0)
    (tmp_path / ".dropping-step-00000001").mkdir()
    assert clear_unfinished(tmp_path) == [".dropping-step-00000001", ".saving-step-00000006"]
    assert names(tmp_path) == []


def test_an_abandoned_save_leaves_nothing(tmp_path: Path) -> None:
    begin_save(tmp_path, 6, 0)
    abandon_save(tmp_path, 6)
    assert names(tmp_path) == []


def test_a_checkpoint_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    path = save_fake(tmp_path, POOL, RANKS, 3)
    (path / "manifest.json").unlink()
    assert save_fake(tmp_path, POOL, RANKS, 3) == path
    assert damage(path) is None and names(tmp_path) == ["step-00000003"]


def test_a_save_that_no_disk_has_room_for_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match="bytes are needed and") as caught:
        begin_save(tmp_path, 3, 2 * free)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []
    check_space(tmp_path, 1)


def test_a_manifest_comes_last(tmp_path: Path) -> None:
    """A rank whose files are not there makes the save fail before anything is published."""
    begin_save(tmp_path, 3, 0)
    shutil.rmtree(building_folder(tmp_path, 3))
    (tmp_path / ".saving-step-00000003").write_text("in the way")
    with pytest.raises(OSError):
        finish_save(tmp_path, fake_state(POOL, 3), "", {})
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(keep=2), [50, 60]),
        (Retention(keep=1, every=20), [20, 40, 60]),
        (Retention(keep=1, best=True), [30, 60]),
        (Retention(keep=2, every=40, best=True), [30, 40, 50, 60]),
        (Retention(keep=9), [10, 20, 30, 40, 50, 60]),
    ],
)
def test_retention_keeps_the_newest_every_so_many_and_the_best(
    tmp_path: Path, retention: Retention, kept: list[int]
) -> None:
    losses = {10: 3.0, 20: None, 30: 1.0, 40: float("nan"), 50: 2.0, 60: 1.5}
    for step in losses:
        save_fake(tmp_path, POOL, RANKS, step)
    drop_old(tmp_path, retention, losses)
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


@given(
    st.dictionaries(st.integers(1, 200), st.none() | st.floats(), max_size=20),
    st.integers(1, 5),
    st.none() | st.integers(1, 50),
    st.booleans(),
)
def test_retention_never_drops_one_of_the_newest(
    losses: dict[int, float | None], keep: int, every: int | None, best: bool
) -> None:
    dropped = no_longer_kept(losses, Retention(keep, every, best))
    assert not set(dropped) & set(sorted(losses)[-keep:])
    assert dropped == sorted(dropped) and set(dropped) <= set(losses)


def test_a_text_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file.json"
    atomic.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n "a": 1\n}\n' and names(path.parent) == ["file.json"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("x")
    with pytest.raises(OSError):
        atomic.write_text(tmp_path / "folder", "text")
    assert names(tmp_path) == ["below", "folder"]
