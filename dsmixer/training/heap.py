"""The host's memory between the steps of a run that trains on the CPU."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""
KEPT = {TRIM_THRESHOLD: 2**31 - 1, MMAP_THRESHOLD: 2**30}
"""Bytes at the end of the heap that are not given back, and of a block that is no part of the heap."""


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for what is allocated next, as torch's allocator does on a GPU.

    By default glibc gives large blocks back to the kernel at once and gets them again, page by page and
    cleared: of the gradients of a large pool that takes longer than to compute them.

    Returns:
        whether the C library has this setting; the memory of others is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in KEPT.items())
