"""One of two ranks that talk to each other: ``… -m dsmixer.training.machine.two_ranks RANK PORT SECONDS``.

Prints a line of JSON for each backend that works: gloo on the CPU, and NCCL where there are two GPUs.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

NUMBERS = 2**20


def main(rank: int, port: int, seconds: float) -> None:
    """Meet the other rank, then add up and exchange numbers."""
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=seconds),
    )
    _tell("gloo", rank, torch.device("cpu"), None)
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        torch.cuda.set_device(rank)
        group = dist.new_group(backend="nccl", timeout=timedelta(seconds=seconds))
        _tell("NCCL", rank, torch.device("cuda", rank), group)
    dist.destroy_process_group()


def _tell(backend: str, rank: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Say whether the sums and what came over are right, and how long they took."""
    began = time.perf_counter()
    added = torch.full((NUMBERS,), rank + 1.0, device=device)
    dist.all_reduce(added, group=group)
    # rank 0 sends one number to itself and three to rank 1, which sends two and one
    sends, comes = ([1, 3], [1, 2]) if rank == 0 else ([2, 1], [3, 1])
    sent = torch.full((sum(sends),), float(rank), device=device)
    come = torch.empty(sum(comes), device=device)
    dist.all_to_all_single(come, sent, comes, sends, group=group)
    expected = [0.0] * comes[0] + [1.0] * comes[1]
    right = bool((added == 3.0).all()) and come.tolist() == expected
    seconds = time.perf_counter() - began
    print(json.dumps({"backend": backend, "right": right, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
