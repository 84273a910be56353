"""Bytes on one rank: what it holds, what comes and goes in a step, and the most at start.

Held, with 4 bytes a weight that trains:

    ZeRO 0     experts, routers, gradients and both moments whole
    ZeRO 1     gradients whole; both moments and a float32 copy of what trains cut over the ranks
    ZeRO 2     gradients cut as well
    ZeRO 3     everything cut, the base too; and a float32 copy of what trains, as in ZeRO 1

deepspeed 0.19.8 means to spare ZeRO-3 that copy where the weights are float32 already, but compares a device
with its name, which is never equal: the copy is always made, and ``tests/dist/test_plan_bytes.py`` sees it.

θ(0) of the preserve term is cut like the moments. 8-bit moments take 1 + 4/256 bytes a weight of an expert
instead of 4; the routers' stay. In ``tokens`` a rank holds its own experts, and ZeRO cuts
those over the EDP ranks that hold the same ones, routers and base over all.

On the host are what DeepSpeed is told to keep there (``offload_optimizer``: float32 copies, moments, θ(0),
gradients and buffers; ``offload_param``: the parts of weights under ZeRO-3), θ(0) with
``preserve.origin: host``, and moments that are paged, which may go there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property

from dsmixer.placement.activations import activation_bytes, working_bytes
from dsmixer.placement.copies import Copies, copies_of
from dsmixer.placement.owners import Owners
from dsmixer.placement.request import EIGHT_BIT, FLOAT32, SCALE_BYTES, PlanRequest, StageShape

COPYING_STAGES = (1, 2, 3)
"""The ZeRO stages that keep a float32 copy of what trains beside the weights themselves."""


@dataclass(frozen=True)
class Layout:
    """One way to place a pool.

    Attributes:
        mode: ``replicate``, ``weights`` or ``tokens``.
        zero_stage: that goes with it.
        owners: of the experts among the ranks of a group; one rank that owns all where it holds all.
    """

    mode: str
    zero_stage: int
    owners: Owners

    @property
    def expert_parallel_size(self) -> int:
        """EP."""
        return len(self.owners.loads)

    def expert_data_parallel_size(self, world_size: int) -> int:
        """EDP: ranks over which ZeRO cuts what an expert needs."""
        return world_size // self.expert_parallel_size

    @cached_property
    def held(self) -> tuple[int, ...]:
        """Experts on each EP rank."""
        found = Counter(rank for parts in self.owners.parts for rank, _ in parts)
        return tuple(found[rank] for rank in range(self.expert_parallel_size))

    @property
    def most_held(self) -> int:
        """Experts on the EP rank that holds most."""
        return max(self.held)

    def copies(self, request: PlanRequest, stage: StageShape) -> Copies | None:
        """How tokens travel in a stage; None where they stay."""
        named = stage.named(request.pool.num_experts)
        if self.mode != "tokens" or named is None:
            return None
        return copies_of(self.owners, named)

    def shared_with(self, world_size: int) -> tuple[tuple[int, ...], ...]:
        """For each EP rank: of each of its experts with several owners, how many ranks hold it."""
        edp = self.expert_data_parallel_size(world_size)
        found: list[list[int]] = [[] for _ in self.owners.loads]
        for parts in self.owners.parts:
            for rank, _ in parts if len(parts) > 1 else ():
                found[rank].append(len(parts) * edp)
        return tuple(map(tuple, found))


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank in one stage.

    Attributes:
        base: frozen weights of the model.
        experts: weights of the stacked banks held here.
        routers: weights of the routers.
        gradients: kept from micro-batch to micro-batch.
        optimizer: both moments, a float32 copy of the weights where ZeRO makes one, and θ(0).
        activations: of one micro-batch.
        buffers: beside the activations: gradients on their way, weights that ZeRO-3 gathers, a mixer's work.
        update: in the optimizer step, when activations and buffers are gone; before it, the gradient of an
            expert with several owners.
        start: the most before the first step: loading the base, making the experts, starting the engine.
        host: in the memory of the host, from step to step.
    """

    base: int
    experts: int
    routers: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    update: int
    start: int
    host: int = 0
    peak: int = field(init=False)

    def __post_init__(self) -> None:
        peak = max(self.held + max(self.activations + self.buffers, self.update), self.start)
        object.__setattr__(self, "peak", peak)

    @property
    def held(self) -> int:
        """What stays from step to step."""
        return self.base + self.experts + self.routers + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, int]:
        """All fields, and ``peak``."""
        return asdict(self)


@dataclass(frozen=True)
class _Tensors:
    """Weights of one kind: how many tensors of which size, and over how many ranks ZeRO cuts them."""

    sizes: tuple[tuple[int, int], ...]
    ranks: int
    trains: bool

    @property
    def whole(self) -> int:
        return sum(numel * count for numel, count in self.sizes)

    @property
    def cut(self) -> int:
        """Weights of one rank's parts; each tensor is padded to a multiple of the ranks."""
        return sum(-(-numel // self.ranks) * count for numel, count in self.sizes)

    def cut_but(self, threshold: int) -> int:
        """As ``cut``, with tensors up to a size whole on every rank beside their part."""
        return self.cut + sum(numel * count for numel, count in self.sizes if numel <= threshold)


def rank_bytes(
    request: PlanRequest, layout: Layout, stage: StageShape, place: int | None = None
) -> RankBytes:
    """What a stage takes on one rank.

    Args:
        request: the plan's.
        layout: the placement.
        stage: the stage.
        place: EP rank; None: the one that holds most experts.
    """
    if place is None:
        place = max(range(layout.expert_parallel_size), key=layout.held.__getitem__)
    held, copies = layout.held[place], layout.copies(request, stage)
    arriving = None if copies is None else copies.arriving(place)
    experts, routers = _experts(request, layout, held, stage), _routers(request, stage)
    zero = layout.zero_stage
    trained = [t for t in (experts, routers) if t.trains]
    offloads = "optimizer" in request.offload and zero > 0
    parts = _weights(request, layout, experts, routers)
    gradients = FLOAT32 * sum(t.cut if zero >= 2 else t.whole for t in trained)
    states = _states(layout, stage, experts, routers)
    away = {name for name in states if offloads or _on_host(stage, name)}
    # under ZeRO-3 each bank is cut as soon as it is made; ZeRO-1/2 copies what trains to one flat tensor
    whole = FLOAT32 * (experts.whole + routers.whole)
    making = parts.experts + parts.routers + FLOAT32 * largest_bank(request, held) if zero == 3 else whole
    flat = FLOAT32 * sum(t.whole for t in trained) if zero in (1, 2) else 0
    shared = stage.trains_experts and layout.shared_with(request.cluster.world_size)[place]
    adding_up = FLOAT32 * expert_weights(request, 1) if shared else 0
    return RankBytes(
        base=parts.base,
        experts=parts.experts,
        routers=parts.routers,
        gradients=0 if offloads and zero > 1 else gradients,
        optimizer=sum(numbers for name, numbers in states.items() if name not in away),
        activations=activation_bytes(request, stage, arriving),
        buffers=max(working_bytes(request, stage, held, arriving), unpacked_bytes(request))
        + _buffers(request, layout, held, trained),
        update=0 if offloads else max(_update(request, layout, trained), adding_up),
        start=parts.loading + making + flat,
        host=parts.host + sum(states[name] for name in away) + _offloaded(layout, stage, trained, offloads),
    )


def _offloaded(layout: Layout, stage: StageShape, trained: list[_Tensors], offloads: bool) -> int:
    """What an offloaded optimizer takes on the host beside its own state.

    Gradients, which ZeRO-3 keeps twice; under ZeRO-1 and 2 the updated weights on their way back and one
    whole gradient; and under ZeRO-2 the gradients of the micro-batches before.
    """
    if not offloads or not trained:
        return 0
    cut = sum(t.cut for t in trained)
    if layout.zero_stage == 3:
        return FLOAT32 * 2 * cut
    largest = max(numel for t in trained for numel, _ in t.sizes)
    before = layout.zero_stage == 2 and stage.accumulation > 1
    return FLOAT32 * (cut * (2 + before) + largest)


def _states(layout: Layout, stage: StageShape, experts: _Tensors, routers: _Tensors) -> dict[str, int]:
    """Bytes of what the optimizer keeps: ``copy``, ``moments`` and ``origin``."""
    zero = layout.zero_stage
    numbers = {t: t.whole if zero == 0 else t.cut for t in (experts, routers) if t.trains}
    both = sum(numbers.values())
    moment = EIGHT_BIT if stage.eight_bit else FLOAT32
    return {
        "copy": FLOAT32 * both * (zero in COPYING_STAGES),
        "moments": int(2 * (moment * numbers.get(experts, 0) + FLOAT32 * numbers.get(routers, 0))),
        "origin": FLOAT32 * both * stage.keeps_origin,
    }


def _on_host(stage: StageShape, state: str) -> bool:
    return (state == "moments" and stage.paged) or (state == "origin" and stage.origin_on_host)


@dataclass(frozen=True)
class _Parts:
    """Bytes of weights on the device, at most while the base is loaded, and on the host."""

    base: int
    experts: int
    routers: int
    loading: int
    host: int = 0


def _weights(request: PlanRequest, layout: Layout, experts: _Tensors, routers: _Tensors) -> _Parts:
    base, loading, limit = (
        base_bytes(request, layout),
        load_bytes(request, layout),
        request.engine.persistence,
    )
    if layout.zero_stage < 3:
        return _Parts(base, FLOAT32 * experts.whole, FLOAT32 * routers.whole, loading)
    parts = _Parts(base, FLOAT32 * experts.cut_but(limit), FLOAT32 * routers.cut_but(limit), loading)
    if "parameters" not in request.offload:
        return parts
    # small ones and the scales of packed ones stay on the device; a packed base goes over it as it loads
    stored = _stored_base(request)
    small = [FLOAT32 * (t.cut_but(limit) - t.cut) for t in (experts, routers)]
    kept = request.base_bytes * (stored.cut_but(limit) - stored.cut) + _scale_bytes(request)
    host = request.base_bytes * stored.cut + FLOAT32 * (experts.cut + routers.cut)
    return _Parts(kept, small[0], small[1], loading if request.four_bit else loading - base + kept, host)


def base_bytes(request: PlanRequest, layout: Layout) -> int:
    """The frozen base on one rank; of 4-bit weights ZeRO-3 cuts all but the scales."""
    stored, scales = _stored_base(request), _scale_bytes(request)
    if layout.zero_stage < 3:
        return request.base_bytes * stored.whole + scales
    return request.base_bytes * stored.cut_but(request.engine.persistence) + scales


def load_bytes(request: PlanRequest, layout: Layout) -> int:
    """The base's most while it is loaded.

    Under ZeRO-3 it comes shard by shard, with one whole parameter at a time. In 4 bits it is whole on every
    rank for a moment, whatever the ZeRO stage, with one weight that is not packed yet.
    """
    if request.four_bit:
        return (
            request.base_bytes * _stored_base(request).whole + _scale_bytes(request) + unpacked_bytes(request)
        )
    largest = max(numel for numel, _ in request.model.parameters)
    in_flight = request.base_bytes * largest if layout.zero_stage == 3 else 0
    return base_bytes(request, layout) + in_flight


def _stored_base(request: PlanRequest) -> _Tensors:
    return _Tensors(request.stored_sizes, request.cluster.world_size, trains=False)


def _scale_bytes(request: PlanRequest) -> int:
    packed = sum(numel * count for numel, count in request.model.quantizable) if request.four_bit else 0
    return int(SCALE_BYTES[request.double_quantization] * packed)


def unpacked_bytes(request: PlanRequest) -> int:
    """The largest 4-bit weight where it is multiplied; 0 for a base that is not in 4 bits."""
    sizes = [numel for numel, _ in request.model.quantizable] if request.four_bit else []
    return request.base_bytes * max(sizes, default=0)


def expert_weights(request: PlanRequest, held: int) -> int:
    """Weights of ``held`` stacked experts on all projections, padding of unequal ranks included."""
    return held * request.pool.rank * request.model.width


def largest_bank(request: PlanRequest, held: int) -> int:
    """Weights of the largest projection's ``held`` stacked experts."""
    widest = max((p.in_features + p.out_features for p in request.model.projections), default=0)
    return held * request.pool.rank * widest


def router_weights(request: PlanRequest) -> int:
    """Weights of all routers."""
    return request.pool.num_experts * sum(request.model.router_widths(request.pool.router))


def _experts(request: PlanRequest, layout: Layout, held: int, stage: StageShape) -> _Tensors:
    rows = held * request.pool.rank
    sizes = tuple(
        (rows * width, 1) for p in request.model.projections for width in (p.in_features, p.out_features)
    )
    ranks = layout.expert_data_parallel_size(request.cluster.world_size)
    return _Tensors(sizes, ranks, stage.trains_experts)


def _routers(request: PlanRequest, stage: StageShape) -> _Tensors:
    widths = request.model.router_widths(request.pool.router)
    sizes = tuple((request.pool.num_experts * width, 1) for width in widths)
    return _Tensors(sizes, request.cluster.world_size, stage.trains_routers)


def _buffers(request: PlanRequest, layout: Layout, held: int, trained: list[_Tensors]) -> int:
    """Gradients on their way between ranks, and under ZeRO-3 the gathered weights."""
    engine, numel = request.engine, sum(t.whole for t in trained)
    if layout.zero_stage < 3:
        if request.cluster.world_size == 1 and layout.zero_stage == 0:
            return 0
        # a bucket, and the flat copy that is reduced
        bucket = engine.plain_bucket if layout.zero_stage == 0 else 2 * engine.reduce_bucket
        return FLOAT32 * min(bucket, numel if layout.zero_stage == 0 else 2 * numel)
    return FLOAT32 * (engine.reduce_bucket + min(engine.reduce_bucket, numel)) + gathered_bytes(request, held)


def gathered_bytes(request: PlanRequest, held: int) -> int:
    """Weights that ZeRO-3 may keep gathered: as many as DeepSpeed allows, and at least the largest mixer."""
    base = _stored_base(request).whole
    experts = expert_weights(request, held) + router_weights(request)
    live = min(1.0, (request.engine.max_live + request.engine.prefetch) / max(1, base + experts))
    largest = max((p.in_features + p.out_features for p in request.model.projections), default=0)
    at_least = FLOAT32 * held * request.pool.rank * largest
    return max(int(live * (request.base_bytes * base + FLOAT32 * experts)), at_least)


def _update(request: PlanRequest, layout: Layout, trained: list[_Tensors]) -> int:
    """The optimizer step: the flat gradient of a partition, and four temporaries of its largest bank.

    Where some experts were not reached, their rows are picked out of weights, gradient and moments first:
    four more.
    """
    if not trained:
        return 0
    cut = layout.zero_stage > 0
    part = sum(t.cut for t in trained)
    largest = max(numel for t in trained for numel, _ in t.sizes)
    span = (
        min(largest, part)
        if layout.zero_stage != 3
        else max(-(-n // t.ranks) for t in trained for n, _ in t.sizes)
    )
    flat = min(part, request.engine.sub_group) if layout.zero_stage == 3 else part
    return FLOAT32 * (8 * span + (flat if cut else 0))
