"""How long a collective may take while the ranks watch over each other, and how a watch ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsmixer.config.errors import UserError
from dsmixer.config.schema import HealthConfig
from dsmixer.training.heartbeat import watching
from dsmixer.training.world import World

WORLD = World(0, 1, torch.device("cpu"))
JOINED = timedelta(seconds=90)


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """A real group of this one process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=JOINED)
    yield
    dist.destroy_process_group()


def limit_of(group: dist.ProcessGroup | None) -> timedelta:
    assert group is not None
    limit: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return limit


def test_under_a_heartbeat_a_collective_may_wait_for_hours_in_groups_of_a_stage_too() -> None:
    """A step, a download or an evaluation longer than the rendezvous is no reason to end a run."""
    assert limit_of(dist.group.WORLD) == JOINED
    with watching(WORLD, HealthConfig(hang_timeout=60.0)) as pulse:
        assert limit_of(dist.group.WORLD) == timedelta(hours=12)
        later = dist.new_group([0])
        with pulse.inside(1):
            assert limit_of(later) == timedelta(hours=12)


@pytest.mark.parametrize(("hang_timeout", "minutes"), [(60.0, 30), (7200.0, 120)])
def test_without_a_heartbeat_a_collective_has_a_limit_of_its_own(hang_timeout: float, minutes: int) -> None:
    with watching(WORLD, HealthConfig(heartbeat=False, hang_timeout=hang_timeout)):
        assert limit_of(dist.group.WORLD) == timedelta(minutes=minutes)


def test_a_rank_whose_others_have_all_left_does_not_wait_for_a_verdict() -> None:
    began = time.monotonic()
    with pytest.raises(UserError), watching(WORLD, HealthConfig()):
        raise UserError("wrong")
    assert time.monotonic() - began < 4.0


VERDICT = """
import sys, threading
import torch
import torch.distributed as dist
from dsmixer.config.schema import HealthConfig
from dsmixer.training import heartbeat
from dsmixer.training.judge import Verdict
from dsmixer.training.world import World
store = dist.FileStore(sys.argv[1], 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
heartbeat.judge = lambda heard, now, **limits: Verdict("gone", (1,), "rank 1 is gone")
print("what waits in the buffer", end="")
with heartbeat.watching(World(0, 1, torch.device("cpu")), HealthConfig()):
    threading.Event().wait(60)
sys.exit(7)
"""


def test_a_verdict_that_can_not_be_printed_ends_the_rank_all_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-c", VERDICT, str(tmp_path / "store of it")]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, check=False).returncode == 1
