"""What a start makes up for after a process that was killed while it built DeepSpeed's op."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsmixer.training.world import _is_open, _prepare_shared_memory_op


def test_a_build_lock_that_nobody_holds_is_removed_and_a_held_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w"):
        assert _is_open(lock)
        _prepare_shared_memory_op(local_rank=0)
        assert lock.exists(), "a build is under way"
    _prepare_shared_memory_op(local_rank=1)
    assert lock.exists(), "one rank a node clears it"
    _prepare_shared_memory_op(local_rank=0)
    assert not lock.exists()
