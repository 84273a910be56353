"""Bytes that one rank sends in one optimizer step, by exchange.

Weights gathered by ZeRO-3 travel twice a micro-batch (forward, backward), and where they train their gradient
once:

    weights    3 · R · E · (D + O) · b_w · (W − 1) / W                        a micro-batch
    tokens     2 · n · K̂ · (D + O) · b_x · (EP − 1) / EP                      a micro-batch
               K̂ = EP · (1 − (1 − 1/EP)^K), the ranks that hold a token's K experts, on average;
               in stage one K = 1, the expert of the token's domain, and so K̂ = 1
    gradients  2 · (what trains) · 4 · (W − 1) / W                            all-reduce

The first two count forward and backward pass. A dispatch shared by projections counts their input once; in
stage one, where no router is asked, none is shared.
ZeRO-2 reduces gradients every micro-batch, ZeRO 0 and 1 once a step; ZeRO 1 and 2 gather the new weights
after it (half of an all-reduce more). deepspeed 0.19.8 all-reduces under ZeRO-1/2, also where a rank then
keeps a part only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dsmixer.placement.memory import Layout, expert_weights, router_weights
from dsmixer.placement.request import FLOAT32, Cluster, PlanRequest, StageShape


@dataclass(frozen=True)
class StepTraffic:
    """Bytes a rank sends in one step.

    Attributes:
        base: the base's weights, gathered by ZeRO-3.
        weights: the experts' and routers' weights and gradients under ZeRO-3.
        tokens: inputs and partial outputs of tokens.
        gradients: of what trains, reduced over the ranks that hold it, with ZeRO-1/2's gather of the result.
    """

    base: float
    weights: float
    tokens: float
    gradients: float

    @property
    def total(self) -> float:
        return self.base + self.weights + self.tokens + self.gradients

    def to_dict(self) -> dict[str, int]:
        """Whole bytes, with ``total``."""
        return {key: round(value) for key, value in (*asdict(self).items(), ("total", self.total))}


def others(num_ranks: int) -> float:
    """The share of what a rank exchanges with its group that leaves it: (N − 1) / N."""
    return (num_ranks - 1) / num_ranks


def dispatch_width(request: PlanRequest, stage: StageShape) -> int:
    """Σ (D + O), with D once for projections whose shared router lets one dispatch serve them."""
    return request.dispatch_inputs(stage) + sum(p.out_features for p in request.model.projections)


def weights_exchange(request: PlanRequest) -> float:
    """``weights`` a micro-batch, all experts training."""
    numel = expert_weights(request, request.pool.num_experts)
    return 3.0 * numel * FLOAT32 * others(request.cluster.world_size)


def tokens_exchange(request: PlanRequest, stage: StageShape, ep: int) -> float:
    """``tokens`` a micro-batch; in stage one each token goes to the one expert of its domain."""
    width = dispatch_width(request, stage)
    return 2.0 * stage.tokens * stage.copies(ep) * width * request.base_bytes * others(ep)


def step_traffic(request: PlanRequest, layout: Layout, stage: StageShape) -> StepTraffic:
    """What one rank sends in one optimizer step of a stage."""
    world, micro = request.cluster.world_size, stage.accumulation
    edp, zero = layout.expert_data_parallel_size(world), layout.zero_stage
    banks = FLOAT32 * expert_weights(request, layout.held)
    routers = FLOAT32 * router_weights(request)
    parts = ((banks, edp, stage.trains_experts), (routers, world, stage.trains_routers))
    base = weights = gradients = 0.0
    if zero == 3:
        gathered = 0 if request.four_bit else request.base_bytes * request.model.num_weights
        base = 2.0 * micro * gathered * others(world)
        asked = stage.top_k is not None  # stage one gathers no router
        for size, group, trains in parts if asked else parts[:1]:
            weights += micro * (2 + trains) * size * others(group)
    else:
        times = 2 * (micro if zero == 2 else 1) + (zero > 0)
        gradients = sum(times * size * others(group) for size, group, trains in parts if trains)
    tokens = 0.0
    if layout.mode == "tokens":
        tokens = micro * tokens_exchange(request, stage, layout.expert_parallel_size)
    return StepTraffic(base, weights, tokens, gradients)


def step_seconds(traffic: StepTraffic, layout: Layout, cluster: Cluster) -> float | None:
    """How long the exchanges take one after another at the links' full speed; None if no speed is known.

    Tokens stay inside a node while EP does; everything else crosses nodes as soon as there are several.
    """
    if cluster.link_speed is None:
        return None
    between = cluster.node_link_speed or cluster.link_speed
    far = between if cluster.world_size > cluster.ranks_per_node else cluster.link_speed
    token_speed = between if layout.expert_parallel_size > cluster.ranks_per_node else cluster.link_speed
    return (traffic.total - traffic.tokens) / far + traffic.tokens / token_speed
