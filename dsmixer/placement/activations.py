"""Bytes of activations: a formula for decoder layers with a frozen base, and what it leaves out.

A frozen projection keeps nothing for the backward pass. What a layer keeps, for each of n tokens, with
activations of b bytes, residual width H, query width Q, key/value width V, feed-forward width F:

    norms      2 · 4 H, as they run in float32; the first of all, which reads the frozen embedding, keeps none
    attention  b (Q + 2 V) rotated queries, keys and values, b Q its output, 4 heads for the sums of scores;
               eager: 4 heads · S scores instead and, where b is less, b heads · S, with 2 Q for 2 V
    mixers     b D for each input that the base does not keep anyway: H that q, k and v read, once, likewise
               gate and up; what down, in, x and out read; not what o (attention's output) and dt read.
               Dropout adds nothing: its mask is made again
    routing    for each router in stage two 4 E, its probabilities, and 12 K + 4 for expert ids (int64),
               weights (float32) and the weights' sum; where all experts answer 5 E + 4 for their weights
               instead. In stage one 12, once for all layers
    mlp        3 b F gated (both branches and the activated one), 2 b F otherwise

In stage two, where experts are spread over ranks, a mixer keeps the tokens that arrived instead of its
input, M b D once for each dispatch, with their pairs, 16 K: for each projection, or for each block that
shares a router. M is their number for each token of a micro-batch, on average over tokens that choose evenly
(``placement.copies``); a rank whose experts everybody chooses receives up to EP. Routers keep the block's
input beside them. Stage one moves no tokens.

Checkpointed, a layer keeps its input, b H, and one layer at a time is computed again. Beside the layers stand
the last norm, and the logits over C tokens of the vocabulary: b C, and b C for their gradient, with three
blocks of them in float32; they are gone before a checkpointed layer runs again. The working memory of the
largest mixer is what its form makes and frees again: for ``dense`` three tensors of n · E · R, for
``grouped`` n · K rows of 2 (D + O) + 3 R, with dropout the mask and the masked input, and a bank in the
compute dtype; where tokens travel, n · M stands for n, and each of those is sent and received, 2 (D + O).
A loss on what experts put out by themselves keeps nothing more. It makes at most ``OUTPUT_ELEMENTS`` outputs
at a time, with the inputs of their pairs and both gradients, and a second gradient of the mixer's bank.

Layers of an encoder-decoder model keep what ``placement.sides`` says, with as many tokens on both sides.

A layer with a state-space mixer keeps one norm, 4 H + 4, and what ``placement.scans`` says instead of
attention and mlp; its residual stream and logits are in float32.

Left out: what the allocator loses between tensors, the attention mask of packed rows, and models whose layers
are not of these kinds. Rows are taken as full.
"""

from __future__ import annotations

from dsmixer.placement.request import FLOAT32, PlanRequest, Projection, StageShape
from dsmixer.placement.scans import scan_work, state_space_bytes
from dsmixer.placement.sides import (
    checkpoint_bytes,
    decoder_layer_bytes,
    encoder_layer_bytes,
    norm_bytes,
)

DENSE_LIMIT = 512
"""E · R up to which ``experts.dense`` multiplies all experts at once; a test holds the two together."""

OUTPUT_ELEMENTS = 2**22
"""Outputs of single experts that ``experts.apart`` makes at a time; a test holds the two together."""

BLOCK_ELEMENTS = 2**20
"""Logits of a block in ``losses.task``; a test holds the two together."""


def activation_bytes(request: PlanRequest, stage: StageShape, arriving: float | None = None) -> int:
    """What a rank keeps between forward and backward pass, and the logits, of one micro-batch.

    Args:
        request: the plan's.
        stage: the stage.
        arriving: M, tokens that arrive for each of a micro-batch; None: tokens stay where they are.
    """
    if request.model.layer.encoder is not None:
        return _both_sides(request, stage, arriving)
    layers = request.model.layer.layers
    one, logits = layer_bytes(request, stage, arriving), logit_bytes(request, stage)
    if not request.checkpointing:
        # the first norm keeps nothing, and there is one behind the last layer
        return layers * one + _hard_bytes(stage) + logits
    wide = request.model.layer.wide_residual
    inputs = layers * stage.tokens * (FLOAT32 if wide else request.base_bytes) * request.model.layer.hidden
    last_norm = stage.tokens * FLOAT32 * request.model.layer.hidden
    return inputs + last_norm + _hard_bytes(stage) + max(one, logits)


def _both_sides(request: PlanRequest, stage: StageShape, arriving: float | None) -> int:
    """As ``activation_bytes``, of an encoder-decoder model: see ``placement.sides``."""
    shape, b, n = request.model.layer, request.base_bytes, stage.tokens
    assert shape.encoder is not None
    mixers, logits = mixer_bytes(request, stage, arriving), logit_bytes(request, stage)
    always = n * b * shape.hidden + 2 * _hard_bytes(stage)
    decoder = n * decoder_layer_bytes(shape, b, stage)
    if not request.checkpointing:
        encoder = n * encoder_layer_bytes(shape, b, stage)
        # the first norm of each side keeps nothing, and there is one behind its last layer
        return int(shape.encoder.layers * encoder + shape.layers * decoder) + mixers + always + logits
    # a decoder layer attends twice, an encoder layer once
    of_layer = 2 * mixers // (shape.encoder.layers + 2 * shape.layers)
    kept = n * (checkpoint_bytes(shape, b, stage) + 2 * norm_bytes(shape, b))
    return int(kept) + always + max(int(decoder) + of_layer, logits)


def layer_bytes(request: PlanRequest, stage: StageShape, arriving: float | None = None) -> int:
    """What one decoder layer keeps of a micro-batch."""
    shape, b, n = request.model.layer, request.base_bytes, stage.tokens
    if shape.state_space is not None:
        own = FLOAT32 * (shape.hidden + 1) + state_space_bytes(shape.state_space, b, stage.max_length)
        return int(n * own) + mixer_bytes(request, stage, arriving) // shape.layers
    norms = 2 * FLOAT32 * shape.hidden
    attention = b * (2 * shape.query + 2 * shape.key_value) + FLOAT32 * shape.heads
    if shape.eager:
        scores = FLOAT32 + (b if b < FLOAT32 else 0)
        attention = 4 * b * shape.query + scores * shape.heads * stage.max_length
    mlp = (3 if shape.gated else 2) * b * shape.mlp
    return n * (norms + attention + mlp) + mixer_bytes(request, stage, arriving) // shape.layers


def mixer_bytes(request: PlanRequest, stage: StageShape, arriving: float | None = None) -> int:
    """What all mixers keep of a micro-batch: their inputs, and E or K numbers a token."""
    blocks = {p.block: p.in_features for p in request.model.projections if not p.kept}
    inputs: float = request.base_bytes * sum(blocks.values())
    if stage.top_k is None:
        return int(stage.tokens * inputs)
    num_experts, dispatches = request.pool.num_experts, request.dispatches
    pairs = 5 * num_experts if stage.every_expert else 12 * stage.top_k
    routing = len(dispatches) * (FLOAT32 * num_experts + pairs + FLOAT32)
    if arriving is not None:
        named = stage.named(num_experts) or 0
        inputs += arriving * (request.base_bytes * sum(dispatches) + 16 * named * len(dispatches))
    return int(stage.tokens * (inputs + routing))


def _hard_bytes(stage: StageShape) -> int:
    """Stage one's expert ids and weights, which all mixers share."""
    return 12 * stage.tokens if stage.top_k is None else 0


def logit_bytes(request: PlanRequest, stage: StageShape) -> int:
    """Logits, their gradient, and the blocks of float32 in which it is made: one, the next, and its work."""
    vocabulary, wide = request.model.layer.vocabulary, request.model.layer.wide_logits
    logits = stage.tokens * vocabulary
    block = min(logits, max(vocabulary, BLOCK_ELEMENTS))
    blocks = 3 if logits > block else 2
    return 2 * (FLOAT32 if wide else request.base_bytes) * logits + blocks * FLOAT32 * block


def working_bytes(request: PlanRequest, stage: StageShape, held: int, arriving: float | None = None) -> int:
    """What the largest mixer makes and frees again in its backward pass, of ``held`` experts."""
    projections = request.model.projections
    mixers = max((_mixer_work(request, stage, p, held, arriving) for p in projections), default=0)
    shape = request.model.layer.state_space
    return mixers if shape is None else max(mixers, stage.tokens * scan_work(shape))


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
    if request.dropout:
        made += n * (b + 1) * projection.in_features
    moved = 0 if arriving is None else 2 * n * b * width
    if stage.outputs_apart:
        gradient *= 2
        made = max(made, _outputs_work(request, stage, projection))
    return int(cast + gradient + made + moved)


def _outputs_work(request: PlanRequest, stage: StageShape, projection: Projection) -> int:
    """Inputs of the pairs and their outputs, sorted by expert and not, their float32 and the gradients, of a
    block; and the gradient of the whole input."""
    b, each = request.base_bytes, stage.tokens * (stage.named(request.pool.num_experts) or 1)
    elements = min(each * max(projection.in_features, projection.out_features), OUTPUT_ELEMENTS)
    return elements * (2 * b + 3 * FLOAT32) + stage.tokens * b * projection.in_features
