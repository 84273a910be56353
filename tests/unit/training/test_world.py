"""How ranks come together, and what a start makes up for after a process that was killed in its start."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.launching import free_port, launch_environment

from dsmixer.training.machine.open_files import is_open
from dsmixer.training.world import _prepare_shared_memory_op, limit_collectives

JOIN = """
import sys
from dsmixer.cli.main import guarded
from dsmixer.training.world import join_world
sys.exit(guarded(lambda: join_world(3.0) and 0))
"""


def join_alone(rank: int) -> subprocess.CompletedProcess[str]:
    """One rank of three, to which nobody comes."""
    port = str(free_port())
    place = {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = {**launch_environment(), **place, "MASTER_PORT": port}
    command = [sys.executable, "-c", JOIN]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_ranks_that_do_not_come_are_named_and_the_same_command_may_be_tried_again() -> None:
    done = join_alone(0)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the 3 ranks did not come together (rank 0 on " in done.stderr
    assert (
        "ranks 1, 2 did not come within 3 s" in done.stderr and "\n  Fix: start one launcher" in done.stderr
    )


def test_a_rank_that_does_not_find_rank_0_says_where_it_looked() -> None:
    done = join_alone(1)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: 127.0.0.1, port " in done.stderr and "(rank 1 on " in done.stderr


def test_the_limit_of_collectives_is_set_in_every_group(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        groups = [dist.group.WORLD, dist.new_group([0])]
        limit_collectives(timedelta(hours=12))
        for group in groups:
            options = group._get_backend(torch.device("cpu")).options
            assert options._timeout == timedelta(hours=12)
    finally:
        dist.destroy_process_group()


def test_a_build_lock_that_nobody_holds_is_removed_and_a_held_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w"):
        assert is_open(lock)
        _prepare_shared_memory_op(local_rank=0)
        assert lock.exists(), "a build is under way"
    _prepare_shared_memory_op(local_rank=1)
    assert lock.exists(), "one rank a node clears it"
    _prepare_shared_memory_op(local_rank=0)
    assert not lock.exists()
