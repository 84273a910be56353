"""The most memory that this process took while it worked.

On a GPU what torch's allocator counts. On the CPU nobody counts allocations: it is the largest resident size
of the process, which Linux keeps and lets a process set back, less its size before anything was built. Freed
memory is handed back to the system first, so that one case does not hide in what another one left.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

SET_BACK_PEAK = "5"
"""Written to ``/proc/self/clear_refs``: the resident peak is now the resident size."""


class PeakMemory:
    """Made before a case is built; ``start`` when the measured steps begin.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        gc.collect()
        if not self.on_gpu:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = torch.cuda.memory_allocated() if self.on_gpu else _status("VmRSS")

    def start(self) -> None:
        """Forget what building took."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text(SET_BACK_PEAK, encoding="ascii")

    def num_bytes(self) -> int:
        """Since ``start``, beyond what was there before."""
        most = torch.cuda.max_memory_allocated() if self.on_gpu else _status("VmHWM")
        return most - self.before


def available_bytes() -> int:
    """Memory of the machine that new work can have."""
    return _field("/proc/meminfo", "MemAvailable")


def _status(field: str) -> int:
    """A size of this process, in bytes."""
    return _field("/proc/self/status", field)


def _field(path: str, field: str) -> int:
    for line in Path(path).read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {field}")
