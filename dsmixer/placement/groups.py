"""Everything dsmixer knows of DeepSpeed's insides, in one file, for deepspeed 0.19.8.

ZeRO keeps what trains as flat float32 partitions. These functions say which part of which parameter
stands where in them, so that our optimizer can treat experts apart and our checkpoints can put whole
tensors together again. Parity tests over the ZeRO stages hold it to the pinned version.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from dsmixer.placement.exchange import Placement, TokenExchange
from dsmixer.placement.layout import ExpertLayout


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
    if _offloads(engine.optimizer):
        # DeepSpeed has put them beside the offloaded partitions already
        return [[_run_of_gradient(shard, piece) for piece in shard.pieces] for shard in of]
    found = []
    for i, shard in enumerate(of):
        starts: dict[int, torch.Tensor] = {}
        offset = 0
        for tensor in engine.optimizer.averaged_gradients[i]:
            starts[offset] = tensor
            offset += tensor.numel()
        found.append([_flat_piece(starts[piece.flat_start], piece) for piece in shard.pieces])
    return found


def _offloads(zero: Any) -> bool:
    """Whether the optimizer's partitions live on the host."""
    return bool(getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False))


def _run_of_gradient(shard: Shard, piece: Piece) -> torch.Tensor:
    gradient = shard.weights.grad
    assert gradient is not None, "the offloaded gradient is not there"
    return gradient.view(-1)[piece.flat_start : piece.flat_start + piece.numel]


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
        reduced = values.to(engine.device)  # offloaded partitions are summed on the host
        dist.all_reduce(reduced)
        if reduced is not values:
            values.copy_(reduced)
    return values


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """All-reduce a small buffer in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_full(
    engine: Any, of: list[Shard], layout: ExpertLayout, flat_of: Callable[[int], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whole tensors from the shards of all ranks, float32 on the CPU, by parameter name.

    Every rank must call it, in the same order. One parameter at a time, so that no rank holds more than
    one gathered tensor on the device.

    Args:
        engine: the DeepSpeed engine.
        of: ``shards(engine)``.
        layout: the experts of this rank; a bank comes out with all experts of the pool.
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
        shape = whole_shape(name, full_shape(parameter), layout)
        full = torch.zeros(shape, dtype=torch.float32, device=engine.device)
        for i, piece in where.get(name, ()):
            for run in runs_of(piece, layout):
                run.of_whole(full).copy_(run.of_flat(flat_of(i)))
        whole[name] = sum_over_partitions(engine, full).cpu()
    return whole


@torch.no_grad()
def scatter_full(
    of: list[Shard],
    layout: ExpertLayout,
    whole: Mapping[str, torch.Tensor],
    flat_of: Callable[[int], torch.Tensor],
) -> None:
    """The way back: write this rank's pieces of whole tensors into its flat ones."""
    for i, shard in enumerate(of):
        for piece in shard.pieces:
            for run in runs_of(piece, layout):
                run.of_flat(flat_of(i)).copy_(run.of_whole(whole[piece.name]))


def is_bank(name: str) -> bool:
    """Whether a parameter is a stack of experts, and not a router."""
    return ".bank." in name


def whole_shape(name: str, shape: tuple[int, ...], layout: ExpertLayout) -> tuple[int, ...]:
    """The shape of a parameter over all ranks: a bank with the whole pool."""
    return (layout.num_experts, *shape[1:]) if is_bank(name) else shape


@dataclass(frozen=True)
class Run:
    """Elements of one expert (or of a router) that lie together in a partition.

    Attributes:
        unit: the expert in the pool; None for a router.
        inside: where they start in the expert's (or router's) flattened weights.
        flat_start: where they start in the partition.
        numel: how many.
    """

    unit: int | None
    inside: int
    flat_start: int
    numel: int

    def of_flat(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.flat_start : self.flat_start + self.numel]

    def of_whole(self, whole: torch.Tensor) -> torch.Tensor:
        rows = whole.view(1, -1) if self.unit is None else whole.view(whole.shape[0], -1)
        return rows[self.unit or 0, self.inside : self.inside + self.numel]


def runs_of(piece: Piece, layout: ExpertLayout) -> list[Run]:
    """A piece cut at its experts."""
    if not is_bank(piece.name):
        return [Run(None, piece.param_start, piece.flat_start, piece.numel)]
    width = math.prod(piece.shape[1:])
    found, done = [], 0
    while done < piece.numel:
        place, inside = divmod(piece.param_start + done, width)
        numel = min(width - inside, piece.numel - done)
        found.append(Run(layout.local[place], inside, piece.flat_start + done, numel))
        done += numel
    return found


def whole_parameter(name: str, parameter: nn.Parameter, placement: Placement) -> torch.Tensor:
    """A parameter's full value over all ranks, on the CPU.

    A collective where ZeRO-3 holds it partitioned, or where experts are spread over ranks.
    """
    own = _unpartitioned(parameter)
    layout, exchange = placement.layout, placement.exchange
    if not is_bank(name) or layout.size == 1:
        return own.cpu().clone()
    whole = own.new_zeros(whole_shape(name, tuple(own.shape), layout))
    whole[list(layout.local)] = own
    assert isinstance(exchange, TokenExchange)
    dist.all_reduce(whole, group=exchange.group)
    return whole.cpu()


def _unpartitioned(parameter: nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        own = parameter.detach().clone()
    assert tuple(own.shape) == full_shape(parameter), "the parameter was not gathered"
    return own


@torch.no_grad()
def set_parameter(parameter: nn.Parameter, own: torch.Tensor) -> None:
    """Write this rank's value of a parameter, unpartitioned; under ZeRO-3 a collective.

    A stage-two engine finds the experts partitioned where stage one ran before it in the same process.
    """
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(own)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(own)


class _ExpertMarker(MoE):
    """Tells DeepSpeed that the model has experts: ZeRO-1 and 2 look for an instance of its MoE layer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_experts = 1

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already."""


def expert_parallel_group(size: int) -> dist.ProcessGroup:
    """The group of this rank's EP ranks, neighbours first; made once for each size."""
    name = _group_name(size)
    if name not in deepspeed_groups._get_expert_parallel_group_dict():
        deepspeed_groups._create_expert_and_data_parallel(size)
    group: dist.ProcessGroup = deepspeed_groups._get_expert_parallel_group(name)
    return group


def _group_name(size: int) -> str:
    return f"ep_size_{size}"


def spread_experts(model: nn.Module, experts: list[nn.Parameter], size: int, stage: int) -> None:
    """Mark expert parameters as different on the ranks of a group, before ``deepspeed.initialize``.

    Args:
        model: gets a marker submodule under ZeRO-1 and 2.
        experts: ``lora_A`` and ``lora_B`` of all banks.
        size: EP, above 1.
        stage: ZeRO 1, 2 or 3.
    """
    assert stage > 0, "ZeRO-0 averages the norms of experts over owners (DeepSpeed#8475)"
    name = _group_name(size)
    for parameter in experts:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = name  # type: ignore[attr-defined]
        if stage == 3:
            data_group = deepspeed_groups._get_expert_data_parallel_group(name)
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]
            parameter.ds_zero_partition_process_group = data_group  # type: ignore[attr-defined]
    if stage < 3 and not hasattr(model, "dsmixer_experts"):
        model.add_module("dsmixer_experts", _ExpertMarker())


def parameter_groups(
    experts: list[nn.Parameter], routers: list[nn.Parameter], size: int, stage: int
) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer; none is empty."""
    groups: list[dict[str, Any]]
    if size == 1 or stage == 3:
        groups = [{"params": [*experts, *routers], "name": "mixture"}]
        if stage == 3 and size > 1:
            groups = [{"params": experts, "name": "experts"}, {"params": routers, "name": "routers"}]
    else:
        groups = [
            {"params": experts, "name": _group_name(size), "moe": True},
            {"params": routers, "name": "routers"},
        ]
    return [group for group in groups if group["params"]]


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
