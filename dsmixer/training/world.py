"""The processes of a run: which one this is, and doing a thing once for all of them."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from dsmixer.config.errors import RunError, UserError, from_os_error
from dsmixer.experts.host_library import extensions_folder
from dsmixer.training.machine.open_files import is_open

Result = TypeVar("Result")

BUFFER = "deepspeed_allreduce_buffer_"
"""How DeepSpeed names its files in shared memory."""

BUFFER_AGE = 60.0
"""Seconds after which a buffer that no process maps is taken for forgotten."""

LONGEST_WORK = timedelta(hours=12)
"""How long ranks wait for one that works alone: downloads, tokenises for its node, publishes."""

SHOWN = 8


@dataclass(frozen=True)
class World:
    """World rank and size, and the device of this rank."""

    rank: int
    size: int
    device: torch.device


def world_from_environment() -> tuple[int, int]:
    """World rank and size as the launcher has set them; one process without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def node_rank() -> int:
    """Which node this rank is on, from 0, as DeepSpeed's launcher or torchrun has set it."""
    return int(os.environ.get("CROSS_RANK", os.environ.get("GROUP_RANK", "0")))


def is_first_on_node() -> bool:
    """Whether this is the one rank of its node that does what a node does once."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def join_world(timeout_seconds: float) -> World:
    """Initialise torch.distributed through DeepSpeed: NCCL on GPUs, gloo on CPUs.

    A collective may then take ``timeout_seconds`` too, until ``limit_collectives`` says otherwise.

    Raises:
        RunError: the ranks did not find each other within the time.
    """
    from deepspeed.accelerator import get_accelerator

    rank, size = world_from_environment()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not on_cpu:
        accelerator.set_device(local_rank)
    if not dist.is_initialized():
        if on_cpu:
            _prepare_shared_memory_op(local_rank)
        backend = "gloo" if on_cpu else accelerator.communication_backend_name()
        try:
            _initialize(rank, size, backend, timedelta(seconds=timeout_seconds))
        except dist.DistError as error:
            raise _apart(rank, size, str(error)) from error
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(), local_rank)
    return World(rank, size, device)


def _initialize(rank: int, size: int, backend: str, timeout: timedelta) -> None:
    import deepspeed

    store = _meet(rank, size, timeout) if size > 1 else None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the name of an op it has built
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    del store  # torch has its own now; rank 0 serves both from one port


def _meet(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Wait until all ranks have come to the store that torch will use, so that a missing one can be named.

    Raises:
        RunError: names the ranks that have not come.
        dist.DistError: rank 0 can't be reached.
    """
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)  # torchrun serves it
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        address, port, size, serves, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
    keys = [f"dsmixer/rank-{other}" for other in range(size)]
    store.set(keys[rank], "here")
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError as error:
        missing = [other for other in range(size) if not store.check([keys[other]])]
        if not missing:
            raise
        named = ", ".join(map(str, missing[:SHOWN])) + (" and more" if len(missing) > SHOWN else "")
        came = f"rank{'s' * (len(missing) > 1)} {named} did not come within {timeout.total_seconds():.0f} s"
        raise _apart(rank, size, came) from error
    return store


def _apart(rank: int, size: int, reason: str) -> RunError:
    """What it means that the processes of a run could not find each other."""
    first = reason.split("\n")[0].split("Exception raised from")[0].strip()
    return RunError(
        f"the {size} ranks did not come together (rank {rank} on {socket.gethostname()}: {first})",
        where=f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}",
        fix="start one launcher on every node, each with its own --node_rank and all with the same hostfile, "
        "--master_addr (of node 0) and --master_port, which has to be free there and open between the nodes",
    )


def limit_collectives(timeout: timedelta) -> None:
    """How long a collective may take from now on, in every group that this process is in.

    A group that a library opens later has torch's own limit, 10 minutes on GPUs and 30 on CPUs, until this
    is called again.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _prepare_shared_memory_op(local_rank: int) -> None:
    """Make up for what DeepSpeed's collectives between CPU processes leave behind.

    A process killed while it built the op leaves a lock that every later start would wait on forever; and
    each rank's buffer of 69 MB in shared memory is never removed: not at its end, nor after it was killed.
    """
    for lock in extensions_folder().glob("**/deepspeed_shm_comm/lock"):
        if local_rank == 0 and not is_open(lock):
            lock.unlink(missing_ok=True)
    if local_rank == 0:
        _remove_forgotten_buffers()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    atexit.register(_remove_buffers, f"{BUFFER}*_{address}_{port}_{local_rank}")


def _remove_buffers(pattern: str) -> None:
    for buffer in Path("/dev/shm").glob(pattern):
        buffer.unlink(missing_ok=True)


def _remove_forgotten_buffers() -> None:
    """Remove buffers of this user that no process has in its memory; new ones may be about to be mapped."""
    buffers = [path for path in Path("/dev/shm").glob(f"{BUFFER}*") if _is_forgotten(path)]
    if not buffers:
        return
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            mapped |= {line.split()[-1] for line in maps.read_text().splitlines() if BUFFER in line}
    for buffer in buffers:
        if str(buffer) not in mapped:
            buffer.unlink(missing_ok=True)


def _is_forgotten(buffer: Path) -> bool:
    with contextlib.suppress(OSError):
        found = buffer.stat()
        return found.st_uid == os.getuid() and time.time() - found.st_mtime > BUFFER_AGE
    return False


Failure = tuple[type[UserError] | type[RunError], str, str | None, str | None]
"""An error on its way to other ranks: kind, problem, where, fix."""


def once(world: World, work: Callable[[], Result]) -> Result:
    """Run ``work`` on rank 0 and give its result to every rank; its errors too, so that none waits.

    The result travels pickled between the processes of this run; keep it small.

    Raises:
        UserError, RunError: on every rank, what the work raised, or what its ``OSError`` comes to.
    """
    outcome: list[Any] = [None, None]
    if world.rank == 0:
        outcome = list(_caught(work))
    if world.size > 1:
        dist.broadcast_object_list(outcome, src=0)
    _raise_failure(outcome[1])
    result: Result = outcome[0]
    return result


def first_on_node(
    world: World, work: Callable[[], Result], others: Callable[[], Result] | None = None
) -> Result:
    """Run ``work`` on one rank of each node, and on the others of the node only when that is done.

    For what a node should do once and its ranks share: a download, the making of a cache. The wait is not
    bound by ``health.hang_timeout``. An error of any node's first rank reaches every rank, as with ``once``.

    Args:
        world: the ranks.
        work: what the first rank of each node does.
        others: what the others do afterwards; None: the same.
    """
    if world.size == 1:
        return work()
    first = is_first_on_node()
    result, failure = _caught(work) if first else (None, None)
    for failed in _gather_patiently(world, failure):
        _raise_failure(failed)
    if first:
        return cast(Result, result)
    return (others or work)()


def _caught(work: Callable[[], Result]) -> tuple[Result | None, Failure | None]:
    """The work's result, or the error that it met."""
    try:
        return work(), None
    except (UserError, RunError) as error:
        told = error
    except OSError as error:
        told = from_os_error(error)
    return None, (type(told), told.problem, told.where, told.fix)


def _raise_failure(failure: Failure | None) -> None:
    if failure is not None:
        kind, problem, where, fix = failure
        raise kind(problem, where=where, fix=fix)


def _gather_patiently(world: World, value: Result) -> list[Result]:
    """As ``gather_objects``, but a rank may take hours to come."""
    group = dist.new_group(timeout=LONGEST_WORK)
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    gather_objects(world, None)  # nobody leaves the group while another is still in it
    dist.destroy_process_group(group)
    return values


def gather_objects(world: World, value: Result) -> list[Result]:
    """One small object of every rank, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
