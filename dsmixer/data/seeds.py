"""Random streams that depend on the seed and on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A numpy generator for one purpose, independent of all others made from the same seed.

    Args:
        seed: the run's seed.
        purpose: words and numbers that name the stream, such as ``("cap", "gsm8k")``.
    """
    digest = hashlib.sha256(repr((int(seed), *purpose)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
