"""How the weights of an expert start: the same for an expert wherever it is placed."""

from __future__ import annotations

import hashlib
import math

import torch


def named_generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the names alone.

    The start of an expert then depends neither on the world size, nor on the experts beside it, nor on
    the order in which modules are made.
    """
    digest = hashlib.blake2b("\0".join((str(seed), *names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


def kaiming_rows(rank: int, in_features: int, generator: torch.Generator) -> torch.Tensor:
    """``lora_A`` of one expert, ``[R, D]`` float32, as PEFT starts it: uniform in ±1/sqrt(D).

    PEFT calls ``kaiming_uniform_(a=sqrt(5))``, whose bound is ``sqrt(6 / ((1 + 5) * D))``.
    """
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def normal_rows(num_experts: int, in_features: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """A router's ``G``, ``[E, D]`` float32, from a normal of standard deviation ``std``."""
    return torch.empty(num_experts, in_features).normal_(0.0, std, generator=generator)
