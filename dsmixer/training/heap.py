"""The host's memory between the steps of a run that trains on the CPU."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Parameters of glibc's ``mallopt``."""
PAD = 2**26


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for what is allocated next, as torch's allocator does on a GPU.

    By default glibc gives large blocks back to the kernel at once and gets them again, page by page and
    cleared: of the gradient of a large pool that takes longer than to compute it.

    Returns:
        whether the C library has this setting; the memory of others is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, PAD))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
