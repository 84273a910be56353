"""Bytes of activations: a formula for decoder layers with a frozen base, and what it leaves out.

A frozen projection keeps nothing for the backward pass. What a layer keeps, for each of n tokens, with
activations of b bytes, residual width H, query width Q, key/value width V, feed-forward width F:

    norms      2 · 4 H, as they run in float32
    attention  b (Q + 2 V) rotated queries, keys and values, b Q its output; eager: 2 b heads · S for scores
    mixers     b D once for each block of projections that read one input, such as q, k and v; with dropout
               b D + D for each projection more
    routing    for each projection 12 K bytes: expert ids (int64) and weights (float32) of K experts; for each
               router in stage two 4 E (its probabilities), twice that with the routing loss
    mlp        3 b F gated (both branches and the activated one), 2 b F otherwise

In stage two, where experts are spread over ranks, a mixer keeps the tokens that arrived instead of its
input, M b D once for each dispatch: for each projection, or for each block that shares a router. M is their
number for each token of a micro-batch, on average over tokens that choose evenly (``placement.copies``); a
rank whose experts everybody chooses receives up to EP. Routers keep the block's input beside them. Stage one
moves no tokens.

Checkpointed, a layer keeps its input, b H, and one layer at a time is computed again. Beside the layers stand
the last norm, and the logits over C tokens of the vocabulary: b C once, 4 C in float32 where they are
narrower, and 4 C for each of the log-softmax, which autograd keeps, and its gradient. The working memory of
the largest mixer is what its form makes and frees again: for ``dense`` three tensors of n · E · R, for
``grouped`` n · K rows of 2 (D + O) + 3 R, and a bank in the compute dtype; where tokens travel, n · M stands
for n, and each of those is sent and received, 2 (D + O).

Left out: what the allocator loses between tensors, the attention mask of packed rows, and models whose layers
are not of this kind. Rows are taken as full.
"""

from __future__ import annotations

from dsmixer.placement.request import FLOAT32, PlanRequest, Projection, StageShape

DENSE_LIMIT = 512
"""E · R up to which ``experts.forms`` multiplies all experts at once; a test holds the two together."""


def activation_bytes(request: PlanRequest, stage: StageShape, arriving: float | None = None) -> int:
    """What a rank keeps between forward and backward pass, and the logits, of one micro-batch.

    Args:
        request: the plan's.
        stage: the stage.
        arriving: M, tokens that arrive for each of a micro-batch; None: tokens stay where they are.
    """
    layers = request.model.layer.layers
    one = layer_bytes(request, stage, arriving)
    kept = layers * one
    if request.checkpointing:
        kept = layers * stage.tokens * request.base_bytes * request.model.layer.hidden + one
    last_norm = stage.tokens * FLOAT32 * request.model.layer.hidden
    return kept + last_norm + logit_bytes(request, stage)


def layer_bytes(request: PlanRequest, stage: StageShape, arriving: float | None = None) -> int:
    """What one decoder layer keeps of a micro-batch."""
    shape, b, n = request.model.layer, request.base_bytes, stage.tokens
    norms = 2 * FLOAT32 * shape.hidden
    attention = b * (2 * shape.query + 2 * shape.key_value)
    if shape.eager:
        attention += 2 * b * shape.heads * stage.max_length
    mlp = (3 if shape.gated else 2) * b * shape.mlp
    return n * (norms + attention + mlp) + mixer_bytes(request, stage, arriving) // shape.layers


def mixer_bytes(request: PlanRequest, stage: StageShape, arriving: float | None = None) -> int:
    """What all mixers keep of a micro-batch: their inputs, and E or K numbers a token."""
    n, projections = stage.tokens, request.model.projections
    num_experts = request.pool.num_experts
    pairs = 12 if stage.top_k is None else 12 * stage.top_k
    routing = len(projections) * (FLOAT32 * num_experts if stage.every_expert else pairs)
    if stage.top_k is not None:
        routing += 2 * FLOAT32 * num_experts * len(request.model.router_widths(request.pool.router))
    return int(n * (_input_bytes(request, arriving) + routing))


def _input_bytes(request: PlanRequest, arriving: float | None) -> float:
    """What mixers keep of their inputs, for each token of a micro-batch."""
    b, blocks = request.base_bytes, sum(request.model.router_widths("per_block"))
    if arriving is None:
        return b * blocks + request.dropout * (b + 1) * sum(p.in_features for p in request.model.projections)
    dispatched = sum(request.dispatches)
    return b * blocks + b * arriving * dispatched + request.dropout * dispatched


def logit_bytes(request: PlanRequest, stage: StageShape) -> int:
    """Logits, their float32 copy, the log-softmax and its gradient."""
    copy = FLOAT32 if request.base_bytes < FLOAT32 else 0
    return stage.tokens * request.model.layer.vocabulary * (request.base_bytes + copy + 2 * FLOAT32)


def working_bytes(request: PlanRequest, stage: StageShape, held: int, arriving: float | None = None) -> int:
    """What the largest mixer makes and frees again in its backward pass, of ``held`` experts."""
    projections = request.model.projections
    return max((_mixer_work(request, stage, p, held, arriving) for p in projections), default=0)


def _mixer_work(
    request: PlanRequest, stage: StageShape, projection: Projection, held: int, arriving: float | None
) -> int:
    b, rank = request.base_bytes, request.pool.rank
    n = stage.tokens * (1.0 if arriving is None else arriving)
    width = projection.in_features + projection.out_features
    cast = b * held * rank * width if b < FLOAT32 else 0
    gradient = FLOAT32 * held * rank * width if stage.trains_experts else 0
    if held * rank <= DENSE_LIMIT or stage.every_expert:
        made = 3 * n * b * held * rank
    else:
        made = n * (stage.top_k or 1) * b * (2 * width + 3 * rank)
    moved = 0 if arriving is None else 2 * n * b * width
    return int(cast + gradient + made + moved)
