"""How the ranks of a run share an evaluation, and what they do alike though they have unequal work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn


def world() -> tuple[int, int]:
    """This rank and the number of ranks; 0 and 1 where nothing is distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def dealt(batches: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
    """This rank's batches: every W-th, filled up with empty ones so that all ranks get the same number.

    The batches themselves do not depend on the number of ranks, and neither do the scores.
    """
    rank, size = world()
    for first in range(0, len(batches), size):
        yield batches[first + rank] if first + rank < len(batches) else ()


def summed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum over ranks, on the CPU; ``device`` is one that the ranks can communicate from."""
    if not dist.is_initialized():
        return tensor.cpu()
    shared = tensor.to(device).clone()
    dist.all_reduce(shared)
    return shared.cpu()


def batches_of(rows: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of like length together, the longest first, so that too little memory shows at once."""
    order = sorted(rows, key=lambda row: (-int(lengths[row]), row))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a DeepSpeed engine; ZeRO-3's hooks sit on its own modules."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def needs_company(model: nn.Module) -> bool:
    """Whether all ranks have to enter every module together: ZeRO-3 gathers there, or tokens travel."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return True
    attached = getattr(model, "dsmixer", None)
    return attached is not None and attached.mixture.placement.exchange.travels


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's weights."""
    return next(model.parameters()).device
