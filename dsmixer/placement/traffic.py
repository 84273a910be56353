"""Bytes that one rank sends in one optimizer step, by exchange, on the rank that sends most.

    weights    3 · R · E · (D + O) · b_w · (W − 1) / W                        a micro-batch
    tokens     n · K̂ · (2 · (D + O) · b_x − D₀ · b_x)                         a micro-batch of stage two
    pairs      2 · n · K̂ · 2 K · 4 and 8 (EP − 1), for each dispatch          a micro-batch of stage two
    gradients  2 · (what trains) · 4 · (N − 1) / N                            all-reduce over N ranks

``weights``: ZeRO-3 gathers forward and backward, and scatters the gradient of what trains; where layers are
run again and one has more weights than it may keep, it gathers once more. In stage one it keeps what the
backward pass wants within ``stage3_max_reuse_distance`` weights, about the last half as many of the model; in
stage two it was seen to gather all of them again. Parameters up to ``stage3_param_persistence_threshold`` are
gathered once a step instead, frozen ones and unasked routers too. The embedding is gathered forward only.

``tokens``: inputs go out and sums come back, and their gradients the other way; K̂ copies of a token leave its
rank (``placement.copies``). Nothing below the first block trains, so that no gradient of its input, D₀, is
sent back. Where layers are run again for the backward pass, so are their exchanges: then it is
n · K̂ · 3 · (D + O) · b_x, and D₀ is sent, too. A dispatch shared by projections counts their input once.
Stage one sends no tokens: each rank is fed the domains of its own experts. ``pairs`` are the weights and
indices of a token's experts, in float32, and the number of copies for each rank.

``gradients``: ZeRO-2 reduces every micro-batch, ZeRO 0 and 1 once a step; ZeRO 1 and 2 gather the new weights
after it (half of an all-reduce more). deepspeed 0.19.8 all-reduces under ZeRO-1/2, also where a rank then
keeps a part only. Over it, whatever the ZeRO stage, comes one all-reduce a step for each expert with several
owners, over the N ranks that hold it.

Left out: losses, norms and routing statistics, a few numbers for each expert and router once a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from dsmixer.placement.memory import Layout, expert_weights, router_weights
from dsmixer.placement.request import FLOAT32, Cluster, PlanRequest, StageShape

INT64 = 8


@dataclass(frozen=True)
class StepTraffic:
    """Bytes a rank sends in one step.

    Attributes:
        base: the base's weights, gathered by ZeRO-3.
        weights: the experts' and routers' weights and gradients under ZeRO-3.
        tokens: inputs and partial outputs of tokens.
        pairs: weights and indices of their experts, and the split sizes.
        gradients: of what trains, reduced over the ranks that hold it, with ZeRO-1/2's gather of the result.
    """

    base: float
    weights: float
    tokens: float
    pairs: float
    gradients: float

    @property
    def exchanged(self) -> float:
        """What goes between the ranks of an expert-parallel group."""
        return self.tokens + self.pairs

    @property
    def total(self) -> float:
        return self.base + self.weights + self.exchanged + self.gradients

    def to_dict(self) -> dict[str, int]:
        """Whole bytes, with ``total``."""
        return {key: round(value) for key, value in (*asdict(self).items(), ("total", self.total))}


def others(num_ranks: int) -> float:
    """The share of what a rank exchanges with its group that leaves it: (N − 1) / N."""
    return (num_ranks - 1) / num_ranks


def dispatch_width(request: PlanRequest) -> int:
    """Σ (D + O), with D once for projections whose shared router lets one dispatch serve them."""
    return sum(request.dispatches) + sum(p.out_features for p in request.model.projections)


def first_width(request: PlanRequest) -> int:
    """D₀: widths of the dispatches whose input has no gradient, those of the first block."""
    if request.checkpointing:
        return 0
    projections = request.model.projections
    first = [p.in_features for p in projections if p.block == projections[0].block]
    return sum(first[:1] if request.pool.router == "per_block" else first)


def passes(request: PlanRequest) -> int:
    """How often a layer's exchanges are made: forward, backward, and where it is run again once more."""
    return 3 if request.checkpointing else 2


def weights_exchange(request: PlanRequest) -> float:
    """``weights`` a micro-batch, all experts training and none kept or persistent."""
    numel = expert_weights(request, request.pool.num_experts)
    return 3.0 * numel * FLOAT32 * others(request.cluster.world_size)


def tokens_exchange(request: PlanRequest, num_tokens: int, copies: float) -> float:
    """``tokens`` a micro-batch.

    Args:
        request: the plan's.
        num_tokens: n.
        copies: K̂.
    """
    width = passes(request) * dispatch_width(request) - first_width(request)
    return num_tokens * copies * width * request.base_bytes


def pairs_exchange(request: PlanRequest, num_tokens: int, copies: float, top_k: int, ep: int) -> float:
    """``pairs`` a micro-batch; the split sizes are not sent back.

    Args:
        request: the plan's.
        num_tokens: n.
        copies: K̂.
        top_k: K.
        ep: ranks of a group.
    """
    pairs = passes(request) * num_tokens * copies * 2 * top_k * FLOAT32
    return len(request.dispatches) * (pairs + (passes(request) - 1) * INT64 * (ep - 1))


def step_traffic(request: PlanRequest, layout: Layout, stage: StageShape) -> StepTraffic:
    """What one rank sends in one optimizer step of a stage."""
    micro, ep = stage.accumulation, layout.expert_parallel_size
    base = weights = gradients = tokens = pairs = 0.0
    if layout.zero_stage == 3:
        base, weights = _zero3_traffic(request, layout, stage)
    else:
        times = 2 * (micro if layout.zero_stage == 2 else 1) + (layout.zero_stage > 0)
        gradients = sum(times * size * others(ranks) for size, ranks in _trained(request, layout, stage))
    if stage.trains_experts:
        gradients += shared_gradients(request, layout)
    copies, named = layout.copies(request, stage), stage.named(request.pool.num_experts)
    if copies is not None and named is not None:
        moved = copies.most_moved
        tokens = micro * tokens_exchange(request, stage.tokens, moved)
        pairs = micro * pairs_exchange(request, stage.tokens, moved, named, ep)
    return StepTraffic(base, weights, tokens, pairs, gradients)


def shared_gradients(request: PlanRequest, layout: Layout) -> float:
    """The all-reduces of experts with several owners, on the rank with most of them; once a step."""
    one = 2.0 * FLOAT32 * expert_weights(request, 1)
    by_rank = layout.shared_with(request.cluster.world_size)
    return max(sum(one * others(ranks) for ranks in groups) for groups in by_rank)


def _trained(request: PlanRequest, layout: Layout, stage: StageShape) -> list[tuple[int, int]]:
    """Bytes of what trains, and over how many ranks each part is reduced."""
    world, found = request.cluster.world_size, []
    if stage.trains_experts:
        edp = layout.expert_data_parallel_size(world)
        found.append((FLOAT32 * expert_weights(request, layout.most_held), edp))
    if stage.trains_routers:
        found.append((FLOAT32 * router_weights(request), world))
    return found


def _zero3_traffic(request: PlanRequest, layout: Layout, stage: StageShape) -> tuple[float, float]:
    """What ZeRO-3 gathers and scatters of the base, and of experts and routers."""
    model, world, micro = request.model, request.cluster.world_size, stage.accumulation
    edp = layout.expert_data_parallel_size(world)
    rows = layout.most_held * request.pool.rank
    banks = [(rows * w, 1) for p in model.projections for w in (p.in_features, p.out_features)]
    routers = [(request.pool.num_experts * width, 1) for width in model.router_widths(request.pool.router)]
    own = request.stored_sizes
    asked = stage.top_k is not None  # stage one asks no router
    gathered = [*own, *banks, *(routers if asked else ())]
    again = _gathered_again(request, layout, stage, sum(numel * count for numel, count in gathered))
    limit = request.engine.persistence
    base = request.base_bytes * others(world) * _gathered(own, limit, micro, again, _embedding(request))
    weights = FLOAT32 * others(edp) * _gathered(banks, limit, micro, again)
    weights += FLOAT32 * others(world) * _gathered(routers, limit, micro, again if asked else -1.0)
    weights += micro * sum(size * others(ranks) for size, ranks in _trained(request, layout, stage))
    return base, weights


def _gathered(
    sizes: Iterable[tuple[int, int]], limit: int, micro: int, again: float, forward_only: int = 0
) -> float:
    """Weights gathered in a step: the persistent ones once, others in each pass of each micro-batch."""
    sizes = tuple(sizes)
    large = sum(numel * count for numel, count in sizes if numel > limit)
    small = sum(numel * count for numel, count in sizes if numel <= limit)
    return micro * (large * (1 + again) - forward_only * again) + small


def _gathered_again(request: PlanRequest, layout: Layout, stage: StageShape, numel: int) -> float:
    """How often ZeRO-3 gathers the weights a second time, and a third where layers are run again."""
    reuse = 0 if layout.mode == "tokens" else request.engine.max_reuse  # groups.SPREAD_ZERO3_SIZES
    again = 1.0 if stage.top_k is not None else max(0.0, 1.0 - reuse / 2 / max(1, numel))
    third = request.checkpointing and 2 * numel / request.model.layer.layers > reuse
    return again + third


def _embedding(request: PlanRequest) -> int:
    """Weights of the input embedding, where no output head shares them."""
    layer = request.model.layer
    numel = layer.vocabulary * layer.hidden
    alone = dict(request.model.parameters).get(numel, 0) > 1
    return numel if alone and numel > request.engine.persistence else 0


def step_seconds(traffic: StepTraffic, layout: Layout, cluster: Cluster) -> float | None:
    """How long the exchanges take one after another at the links' full speed; None if no speed is known.

    Tokens stay inside a node while EP does; everything else crosses nodes as soon as there are several.
    """
    if cluster.link_speed is None:
        return None
    between = cluster.node_link_speed or cluster.link_speed
    far = between if cluster.world_size > cluster.ranks_per_node else cluster.link_speed
    token_speed = between if layout.expert_parallel_size > cluster.ranks_per_node else cluster.link_speed
    return (traffic.total - traffic.exchanged) / far + traffic.exchanged / token_speed
