"""Everything dsmixer knows of DeepSpeed's insides, in one file, for deepspeed 0.19.8.

ZeRO keeps what trains as flat float32 partitions. These functions say which part of which parameter stands
where in them, so that our optimizer can treat experts apart and each rank can save its own part. Parity
tests over the ZeRO stages hold it to the pinned version.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.moe.layer import MoE
from deepspeed.runtime.zero import register_external_parameter
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from dsmixer.placement.pieces import Piece, Shard

SPREAD_ZERO3_SIZES = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
"""Of ZeRO-3 where experts are spread over ranks."""


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


def keep_gradients(engine: Any) -> None:
    """Let gradients that no rank shares lie where they are: DeepSpeed would copy all of them into a buffer,
    reduce it over the one rank, and copy them back."""
    if zero_stage(engine) == 0 and dist.get_world_size() == 1:
        engine.enable_backward_allreduce = False


def gradients(engine: Any, of: list[Shard]) -> list[list[torch.Tensor]]:
    """The averaged gradients of a finished accumulation, before ``engine.step``.

    One flat tensor a piece, in the order of ``of`` and its pieces; writing to them in place changes what
    the optimizer gets.
    """
    if zero_stage(engine) == 0:
        return [[_grad_or_zero(shard)] for shard in of]
    if _offloads(engine.optimizer):
        # DeepSpeed has put them beside the offloaded partitions, once its copies from the device have ended
        wait = getattr(engine.optimizer, "_wait_for_offload_copies", None)
        if wait is not None:
            wait()
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


COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
)
"""Of tensors, by their names in torch and in what DeepSpeed calls instead."""


def transfers(engine: Any) -> Iterator[tuple[Any, str]]:
    """Owner and name of the functions that move weights and gradients between ranks, with DeepSpeed's copies
    to and from its buffers: for a profile."""
    yield engine, "_backward_epilogue"
    zero = engine.optimizer
    owners = [(zero, "reduce_ready_partitions_and_remove_grads"), (dist.Work, "wait")]
    if zero_stage(engine) == 3:
        coordinator = zero.parameter_offload.get_param_coordinator()
        owners += [(coordinator, "fetch_sub_module"), (coordinator, "release_sub_module")]
    owners += [(owner, name) for owner in (dist, deepspeed_comm.cdb) for name in COLLECTIVES]
    yield from ((owner, name) for owner, name in owners if hasattr(owner, name))


def unpartitioned(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's value of a parameter, gathered where ZeRO-3 holds it partitioned: there a collective."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        own = parameter.detach().clone()
    assert tuple(own.shape) == full_shape(parameter), "the parameter was not gathered"
    return own


@torch.no_grad()
def fill_parameter(parameter: nn.Parameter, fill: Callable[[torch.Tensor], None]) -> None:
    """Let ``fill`` write this rank's value of a parameter in place; under ZeRO-3 a collective, where the
    first rank of those that share the parameter writes and the others take it from there.

    A stage-two engine finds the experts partitioned where stage one ran before it in the same process.
    """
    if not hasattr(parameter, "ds_id"):
        fill(parameter.detach())
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank(group=parameter.ds_process_group) == 0:  # type: ignore[attr-defined]
            fill(parameter.detach())


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
        model: gets a marker submodule under ZeRO-1 and 2 if its experts train: where DeepSpeed sees it, it
            wants a group of experts.
        experts: ``lora_A`` and ``lora_B`` of all banks.
        size: EP, above 1.
        stage: ZeRO 1, 2 or 3.
    """
    assert stage > 0, "ZeRO-0 averages the norms of experts over owners (DeepSpeed#8475)"
    for parameter in experts:
        _mark(parameter, size, stage)
    if hasattr(model, "dsmixer_experts"):
        del model.dsmixer_experts
    if stage < 3 and any(parameter.requires_grad for parameter in experts):
        model.add_module("dsmixer_experts", _ExpertMarker())


def config_for_spread(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that holds where ranks have banks of different sizes.

    DeepSpeed fills buckets and counts what it prefetches and keeps by the sizes of the parameters it meets,
    banks among them. Ranks whose banks differ would then reduce and gather what they share, routers and base,
    at different moments, and meet in different collectives. Under ZeRO-1 and 2 each gradient is therefore
    reduced by itself, and under ZeRO-3 nothing is prefetched or kept for a later use.
    """
    sizes: dict[str, int] = {"reduce_bucket_size": 1}
    if ds_config["zero_optimization"]["stage"] == 3:
        sizes = SPREAD_ZERO3_SIZES
    return {**ds_config, "zero_optimization": {**ds_config["zero_optimization"], **sizes}}


def _mark(parameter: nn.Parameter, size: int, stage: int) -> None:
    name = _group_name(size)
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = name  # type: ignore[attr-defined]
    if stage == 3:
        data_group = deepspeed_groups._get_expert_data_parallel_group(name)
        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
        parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]
        parameter.ds_zero_partition_process_group = data_group  # type: ignore[attr-defined]


def cut_weights(module: nn.Module, ds_config: Mapping[str, Any], *, experts_over: int = 1) -> None:
    """Leave each rank its part of a module's weights now, as ZeRO-3 else does with all of a model at once.

    Args:
        module: whose weights are whole, and the same on the ranks that hold it.
        ds_config: of the engine to come.
        experts_over: EP, where the module is a bank of experts that are spread; else 1.
    """
    import deepspeed

    if experts_over > 1:
        for parameter in module.parameters():
            _mark(parameter, experts_over, 3)
    # or it would replace torch.nn.functional.linear for the whole process
    block = {**ds_config["zero_optimization"], "memory_efficient_linear": False}
    deepspeed.zero.Init(module=module, config_dict_or_path={**ds_config, "zero_optimization": block})


def read_outside(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let ZeRO-3 gather, around the passes of ``module``, parameters of its children that it reads itself.

    DeepSpeed would find them in the first pass of an engine; a pass without one does not look.
    """
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            register_external_parameter(module, parameter)


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
