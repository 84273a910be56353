"""Everything dsmixer knows of DeepSpeed's insides, in one file, for deepspeed 0.19.8.

ZeRO keeps what trains as flat float32 partitions. These functions say which part of which parameter
stands where in them, so that our optimizer can treat experts apart and our checkpoints can put whole
tensors together again. Parity tests over the ZeRO stages hold it to the pinned version.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Piece:
    """A run of consecutive elements of one parameter inside a flat partition.

    Attributes:
        name: the parameter's name in the model.
        shape: its full shape.
        param_start: where the run starts in the flattened parameter.
        flat_start: where it starts in the partition.
        numel: its length.
    """

    name: str
    shape: tuple[int, ...]
    param_start: int
    flat_start: int
    numel: int


@dataclass(frozen=True)
class Shard:
    """One tensor that this rank's optimizer updates, and what it is made of.

    Attributes:
        weights: float32, the very tensor DeepSpeed hands to the optimizer.
        pieces: in the order of ``flat_start``; what lies between and after them is padding.
    """

    weights: torch.Tensor
    pieces: tuple[Piece, ...]

    def flat(self) -> torch.Tensor:
        return self.weights.detach().view(-1)


def zero_stage(engine: Any) -> int:
    """0, 1, 2 or 3."""
    return int(engine.zero_optimization_stage())


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also while ZeRO-3 holds it partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def shards(engine: Any) -> list[Shard]:
    """The optimizer's tensors on this rank. Each element of a parameter is in one rank's shards, or,
    under ZeRO-0, in every rank's."""
    names = {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}
    stage = zero_stage(engine)
    if stage == 0:
        return [
            Shard(p, (Piece(names[id(p)], tuple(p.shape), 0, 0, p.numel()),))
            for group in engine.optimizer.param_groups
            for p in group["params"]
        ]
    return _shards_zero3(engine.optimizer, names) if stage == 3 else _shards_zero12(engine.optimizer, names)


def _shards_zero12(zero: Any, names: Mapping[int, str]) -> list[Shard]:
    found = []
    for i, weights in enumerate(zero.single_partition_of_fp32_groups):
        size = int(zero.partition_size[i])
        low = size * dist.get_rank(group=zero.real_dp_process_group[i])
        pieces = []
        for parameter, offset in zip(
            zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True
        ):
            start, end = max(offset, low), min(offset + parameter.numel(), low + size)
            if start < end:
                shape = tuple(parameter.shape)
                pieces.append(Piece(names[id(parameter)], shape, start - offset, start - low, end - start))
        found.append(Shard(weights, tuple(pieces)))
    return found


def _shards_zero3(zero: Any, names: Mapping[int, str]) -> list[Shard]:
    found = []
    for i, weights in enumerate(zero.fp32_partitioned_groups_flat):
        rank = dist.get_rank(group=zero.sub_group_process_groups[i])
        pieces, flat_start = [], 0
        for parameter in zero.fp16_groups[i]:
            own = parameter.partition_numel()
            start = own * rank
            numel = min(own, int(parameter.ds_numel) - start)
            if numel > 0:
                shape = full_shape(parameter)
                pieces.append(Piece(names[id(parameter)], shape, start, flat_start, numel))
            flat_start += own
        found.append(Shard(weights, tuple(pieces)))
    return found


def gradients(engine: Any, of: list[Shard]) -> list[list[torch.Tensor]]:
    """The averaged gradients of a finished accumulation, before ``engine.step``.

    One flat tensor a piece, in the order of ``of`` and its pieces; writing to them in place changes what
    the optimizer gets.
    """
    if zero_stage(engine) == 0:
        return [[_grad_or_zero(shard)] for shard in of]
    found = []
    for i, shard in enumerate(of):
        starts: dict[int, torch.Tensor] = {}
        offset = 0
        for tensor in engine.optimizer.averaged_gradients[i]:
            starts[offset] = tensor
            offset += tensor.numel()
        found.append([_flat_piece(starts[piece.flat_start], piece) for piece in shard.pieces])
    return found


def _grad_or_zero(shard: Shard) -> torch.Tensor:
    if shard.weights.grad is None:
        shard.weights.grad = torch.zeros_like(shard.weights)
    return shard.weights.grad.view(-1)


def _flat_piece(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    assert tensor.is_contiguous() and tensor.numel() >= piece.numel, (piece, tuple(tensor.shape))
    return tensor.view(-1)[: piece.numel]


def sum_over_partitions(engine: Any, values: torch.Tensor) -> torch.Tensor:
    """Add up what each rank computed over its own shards, in place: nothing to add under ZeRO-0."""
    if zero_stage(engine) > 0 and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """All-reduce a small buffer in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_full(
    engine: Any, of: list[Shard], flat_of: Callable[[int], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whole tensors from the shards of all ranks, float32 on the CPU, by parameter name.

    Every rank must call it, in the same order. One parameter at a time, so that no rank holds more than
    one gathered tensor on the device.

    Args:
        engine: the DeepSpeed engine.
        of: ``shards(engine)``.
        flat_of: index of a shard to the flat tensor to read: its weights, or a moment of the same shape.
    """
    where: dict[str, list[tuple[int, Piece]]] = {}
    for i, shard in enumerate(of):
        for piece in shard.pieces:
            where.setdefault(piece.name, []).append((i, piece))
    whole = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        full = torch.zeros(full_shape(parameter), dtype=torch.float32, device=engine.device)
        for i, piece in where.get(name, ()):
            run = flat_of(i)[piece.flat_start : piece.flat_start + piece.numel]
            full.view(-1)[piece.param_start : piece.param_start + piece.numel].copy_(run)
        whole[name] = sum_over_partitions(engine, full).cpu()
    return whole


@torch.no_grad()
def scatter_full(
    of: list[Shard], whole: Mapping[str, torch.Tensor], flat_of: Callable[[int], torch.Tensor]
) -> None:
    """The way back: write this rank's pieces of whole tensors into its flat ones."""
    for i, shard in enumerate(of):
        flat = flat_of(i)
        for piece in shard.pieces:
            run = whole[piece.name].reshape(-1)[piece.param_start : piece.param_start + piece.numel]
            flat[piece.flat_start : piece.flat_start + piece.numel].copy_(run)


def whole_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's full value on the CPU; under ZeRO-3 a collective that gathers it for a moment."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        whole = parameter.detach().cpu().clone()
    assert tuple(whole.shape) == full_shape(parameter), "the parameter was not gathered"
    return whole


@torch.no_grad()
def set_parameter(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    """Write a parameter's full value, the same on every rank; under ZeRO-3 a collective.

    A stage-two engine finds the experts partitioned where stage one ran before it in the same process.
    """
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(whole)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(whole)


def count_hooks(model: nn.Module) -> int:
    """Forward hooks and forward pre-hooks on all modules of a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def release(engine: Any, hooks_before: int) -> None:
    """Take an engine off its model, so that the model can be given to another one.

    Args:
        engine: the DeepSpeed engine; unusable afterwards.
        hooks_before: ``count_hooks`` of the model before the engine was made.

    Raises:
        AssertionError: a hook of the engine is left on the model.
    """
    module = engine.module
    engine.destroy()
    # destroy() leaves the engine's own two hooks on the model
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for parameter in module.parameters():
        for name in ("_hp_mapping", "_hp_grad", "_z3_optimizer", "grad_accum"):
            if hasattr(parameter, name):
                delattr(parameter, name)
        parameter.grad = None
    left = count_hooks(module) - hooks_before
    assert left == 0, f"{left} hooks of the engine are left on the model"
    gc.collect()
