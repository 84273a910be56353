"""Bytes of activations that a frozen state-space mixer keeps, apart from its norm and its experts' inputs.

For each token, with activations of b bytes, I channels of N numbers of state (``StateSpaceShape``):

    Mamba    2 b I what in_proj gave (convolution and gate), b I the convolution, b I a time step before
             softplus, b what x_proj gave; without fused kernels further b I the time step, b I the gate, 4 I
             each the scan's input and output, and 12 I N: decays, inputs and states of every position, and
             b I N where these states are read in a type of less than 4 bytes. The fused scan keeps b I its
             output, and its states, 8 I N, only once in 2,048 positions.
    Mamba-2  b (I + channels + heads) what in_proj gave, b for each channel of the convolution, 12 I the gated
             norm or, in less than 4 bytes, 16 I; 4 a head its decay. Without fused kernels further b for each
             channel, or 4 I, what the scan reads; 12 Q a head, a chunk's scores three times; 20 N a head, B
             and C spread over the heads; 12 I; and 8 I N / Q, the chunks' states. The fused scan keeps b I.

Without fused kernels, which was measured, these are within 5 % of what autograd saves; what the fused ones
keep was read in their source. The plain scans of transformers need as much again while they go backwards
(``scan_work``).
"""

from __future__ import annotations

from dsmixer.placement.request import FLOAT32, StateSpaceShape

SCAN_BLOCK = 2048
"""Positions after which mamba_ssm's selective scan keeps its states."""


def state_space_bytes(shape: StateSpaceShape, base_bytes: int, length: int) -> float:
    """What a token of a row of ``length`` keeps of a layer's mixer, in bytes."""
    return (_chunked if shape.heads else _selective)(shape, base_bytes, length)


def _selective(shape: StateSpaceShape, b: int, length: int) -> float:
    inner, state = shape.inner, shape.state
    kept = b * (4 * inner + shape.selected)
    if shape.fused:
        return kept + b * inner + 2 * FLOAT32 * inner * state * _blocks(length, SCAN_BLOCK) / length
    states = 3 * FLOAT32 + (b if b < FLOAT32 else 0)
    return kept + 2 * (b + FLOAT32) * inner + states * inner * state


def _chunked(shape: StateSpaceShape, b: int, length: int) -> float:
    inner, heads = shape.inner, shape.heads
    norm = FLOAT32 * inner * (3 if b == FLOAT32 else 4)
    kept = b * (inner + 2 * shape.channels + heads) + FLOAT32 * heads + norm
    if shape.fused:
        return kept + b * inner
    read = b * shape.channels if b == FLOAT32 else FLOAT32 * inner
    scores = FLOAT32 * heads * (3 * shape.chunk + 5 * shape.state)
    states = 2 * FLOAT32 * inner * shape.state / shape.chunk
    padded = _blocks(length, shape.chunk) * shape.chunk / length
    return kept + read + padded * (scores + states + 3 * FLOAT32 * inner)


def scan_work(shape: StateSpaceShape) -> int:
    """What a token of the plain scan needs for a while in the backward pass, in bytes.

    Gradients of decays, inputs and states of every position; in Mamba-2, of B and C for each head, and of
    what the scan reads.
    """
    if shape.fused:
        return 0
    if shape.heads:
        return 4 * FLOAT32 * (shape.inner + shape.heads * shape.state)
    return 4 * FLOAT32 * shape.inner * shape.state


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
