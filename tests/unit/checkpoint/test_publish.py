"""What stays on disk: interrupted and abandoned saves, retention, space."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.partitions import FakePool, FakeRanks, fake_state, save_fake

from dsmixer.checkpoint import atomic
from dsmixer.checkpoint.parts import file_entry
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


def written(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """The entries of a rank's file that is there."""
    begin_save(folder, step, 0)
    (building_folder(folder, step) / "rank-00000.json").write_text("{}")
    return {"rank-00000.json": file_entry(building_folder(folder, step) / "rank-00000.json")}


@pytest.mark.parametrize("lost", ["removed", "cut"])
def test_a_rank_whose_file_is_not_there_as_written_keeps_all_from_being_published(
    tmp_path: Path, lost: str
) -> None:
    entries = written(tmp_path, 3)
    file = building_folder(tmp_path, 3) / "rank-00000.json"
    file.unlink() if lost == "removed" else file.write_text("{")
    with pytest.raises(OSError) as caught:
        finish_save(tmp_path, fake_state(POOL, 3), "", entries)
    assert caught.value.filename == str(file) and caught.value.strerror
    assert list_checkpoints(tmp_path) == []
    assert not (building_folder(tmp_path, 3) / "manifest.json").exists()


def test_a_manifest_is_written_last_and_the_folder_published_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the names as they appear, and of what has reached the disk before."""
    entries, order = written(tmp_path, 3), []
    replace, rename, fsync = os.replace, os.rename, os.fsync

    def noted_replace(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        replace(source, target)

    def noted_rename(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        rename(source, target)

    def noted_fsync(descriptor: int) -> None:
        order.append(f"flushed {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    finish_save(tmp_path, fake_state(POOL, 3), "", entries)
    named = [name for name in order if not name.startswith("flushed")]
    assert named == ["state.json", "config.yaml", "manifest.json", "step-00000003"]
    manifest, published = order.index("manifest.json"), order.index("step-00000003")
    assert "flushed .manifest.json.part" in order[:manifest]
    assert "flushed .saving-step-00000003" in order[manifest:published]


def test_a_disk_that_fails_anywhere_in_a_save_publishes_nothing_and_after_it_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every flush in turn fails; the one behind the rename comes when the checkpoint is there."""
    fsync, outcomes = os.fsync, []
    for fault in range(8):
        folder, left = tmp_path / str(fault), [fault]
        entries = written(folder, 3)

        def failing(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.EIO, "no disk")
            fsync(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failing)
            try:
                path = finish_save(folder, fake_state(POOL, 3), "", entries)
                assert damage(path) is None
            except OSError:
                assert list_checkpoints(folder) == []
        outcomes.append(len(list_checkpoints(folder)))
    assert outcomes == [0] * 7 + [1], "text and folder of three files, the folder, and the one around it"


@pytest.fixture
def unremovable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some files stay, as those that somebody has open on a network file system."""
    unlink = os.unlink

    def refusing(path: Any, *more: Any, **named: Any) -> None:
        if Path(os.fspath(path)).name.startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        unlink(path, *more, **named)

    monkeypatch.setattr(os, "unlink", refusing)


def leave(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / ".nfs01").write_text("open")


@pytest.mark.usefixtures("unremovable")
def test_rubbish_that_can_not_be_removed_stops_no_save(tmp_path: Path) -> None:
    left = [".dropping-step-00000001", ".dropping-step-00000003", ".saving-step-00000002"]
    for name in left:
        leave(tmp_path / name)
    (tmp_path / ".saving-step-00000004").mkdir()
    assert clear_unfinished(tmp_path) == [".saving-step-00000004"], "what is gone, and no more"
    for _ in range(2):  # the second time over a damaged one, whose hidden name is not free
        path = save_fake(tmp_path, POOL, RANKS, 3)
        assert damage(path) is None
        (path / "manifest.json").unlink()
    leave(save_fake(tmp_path, POOL, RANKS, 3))
    for step in (6, 9):
        save_fake(tmp_path, POOL, RANKS, step)
    drop_old(tmp_path, Retention(keep=1), {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000009"]
    assert ".dropping-step-00000003-1" in names(tmp_path), "what stays is hidden"


@pytest.mark.usefixtures("unremovable")
def test_a_save_whose_own_place_can_not_be_cleared_says_why(tmp_path: Path) -> None:
    leave(tmp_path / ".saving-step-00000003")
    with pytest.raises(OSError, match="busy"):
        begin_save(tmp_path, 3, 0)


def test_the_names_of_new_folders_reach_the_disk_with_the_first_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut would otherwise take a checkpoint whose own files were flushed."""
    flushed: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    folder = tmp_path / "runs" / "mine" / "checkpoints" / "stage1"
    begin_save(folder, 3, 0)
    parents = [str(path) for path in list(folder.parents)[:4]]
    assert [path for path in flushed if path in parents] == list(reversed(parents))
    flushed.clear()
    begin_save(folder, 6, 0)
    assert not set(parents) & set(flushed), "those that were there are left alone"


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
