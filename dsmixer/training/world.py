"""The processes of a run: which one this is, and doing a thing once for all of them."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dsmixer.config.errors import UserError, from_os_error

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """World rank and size, and the device of this rank."""

    rank: int
    size: int
    device: torch.device


def world_from_environment() -> tuple[int, int]:
    """World rank and size as the launcher has set them; one process without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join_world(timeout_seconds: float) -> World:
    """Initialise torch.distributed through DeepSpeed: NCCL on GPUs, gloo on CPUs."""
    import deepspeed
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
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the name of an op it has built
            deepspeed.init_distributed(
                dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
                timeout=timedelta(seconds=timeout_seconds),
                verbose=False,
            )
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(), local_rank)
    return World(rank, size, device)


def _prepare_shared_memory_op(local_rank: int) -> None:
    """Make up for what DeepSpeed's collectives between CPU processes leave behind.

    A process killed while it built the op leaves a lock that every later start would wait on forever; and
    each rank's buffer of 69 MB in shared memory is never removed.
    """
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    for lock in Path(folder).glob("**/deepspeed_shm_comm/lock"):
        if local_rank == 0 and not _is_open(lock):
            lock.unlink(missing_ok=True)
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    atexit.register(_remove_buffers, f"deepspeed_allreduce_buffer_*_{address}_{port}_{local_rank}")


def _is_open(path: Path) -> bool:
    """Whether a process of this user has the file open, as the one that builds does with its lock."""
    wanted = os.path.realpath(path)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == wanted:
                return True
    return False


def _remove_buffers(pattern: str) -> None:
    for buffer in Path("/dev/shm").glob(pattern):
        buffer.unlink(missing_ok=True)


def once(world: World, work: Callable[[], Result]) -> Result:
    """Run ``work`` on rank 0 and give its result to every rank; its ``UserError`` too, so that none waits.

    The result travels pickled between the processes of this run; keep it small.
    """
    outcome: list[Any] = [None, None]
    if world.rank == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = (error.problem, error.where, error.fix)
        except OSError as error:
            refused = from_os_error(error)
            outcome[1] = (refused.problem, refused.where, refused.fix)
    if world.size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        problem, where, fix = outcome[1]
        raise UserError(problem, where=where, fix=fix)
    result: Result = outcome[0]
    return result


def gather_objects(world: World, value: Result) -> list[Result]:
    """One small object of every rank, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
