"""Bytes of activations that the layers of a frozen encoder-decoder model keep, apart from mixers' inputs.

For each token of its side, with activations of b bytes, residual width H, query width Q, feed-forward width F
and rows of S tokens on both sides:

    norm       4 H + 4, and b H beside where b is less than 4; two in an encoder layer, three in a decoder
               layer
    attention  4 b Q, its queries, keys, values and output; 4 heads for the sums of scores; b heads · S the
               bias of positions with the mask in it; twice in a decoder layer. In the decoder's own
               attention, where the mask is the same for all rows, it is kept once for all of them
    mlp        b F as often as the activation keeps it (``EncoderShape.mlp_kept``)
    dropout    of the base's own, where it has one: b for what each of its masks covers, 2 H + F in an encoder
               layer, 3 H + F in a decoder layer

The encoder's output, b H, which keys and values of all decoder layers read, is kept once. Checkpointed, a
layer keeps its input, b H; the biases that layers hand on, one in the encoder and two in the decoder, are
kept once, b heads · S for all rows.

Without dropout these are within 5 % of what autograd saves. With dropout, attention on a CPU keeps its scores
as well, which is left out.
"""

from __future__ import annotations

from dsmixer.placement.request import FLOAT32, LayerShape, StageShape


def norm_bytes(shape: LayerShape, b: int) -> int:
    """One norm."""
    return FLOAT32 * (shape.hidden + 1) + (b * shape.hidden if b < FLOAT32 else 0)


def encoder_layer_bytes(shape: LayerShape, b: int, stage: StageShape) -> float:
    """What a token keeps of an encoder layer, in bytes."""
    return 2 * norm_bytes(shape, b) + _attention(shape, b) + _bias(shape, b, stage) + _rest(shape, b, masks=2)


def decoder_layer_bytes(shape: LayerShape, b: int, stage: StageShape) -> float:
    """What a token keeps of a decoder layer, in bytes."""
    biases = _bias(shape, b, stage) * (1 + 1 / stage.rows)
    return 3 * norm_bytes(shape, b) + 2 * _attention(shape, b) + biases + _rest(shape, b, masks=3)


def checkpoint_bytes(shape: LayerShape, b: int, stage: StageShape) -> float:
    """What a token keeps of all layers of both sides, where they are run again."""
    assert shape.encoder is not None
    inputs = b * shape.hidden * (shape.encoder.layers + shape.layers)
    return inputs + 3 * _bias(shape, b, stage) / stage.rows


def _attention(shape: LayerShape, b: int) -> int:
    return b * 4 * shape.query + FLOAT32 * shape.heads


def _bias(shape: LayerShape, b: int, stage: StageShape) -> int:
    return b * shape.heads * stage.max_length


def _rest(shape: LayerShape, b: int, masks: int) -> int:
    assert shape.encoder is not None
    dropout = b * (masks * shape.hidden + shape.mlp) if shape.encoder.dropout else 0
    return b * shape.encoder.mlp_kept * shape.mlp + dropout
