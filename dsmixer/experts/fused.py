"""The pairs of a token and an expert multiplied where they lie, by kernels in Triton: for GPUs on which
``F.grouped_mm`` has no kernel of its own.

A program takes rows of one expert and gathers their tokens itself, so that no copy of tokens is made, and
casts what it reads of a bank itself, so that no copy of a bank is made. Which rows it takes is found on the
device: the host knows a bound of the number of blocks, and waits for nothing. Every number is the work of one
program, in a fixed order: a run is the same bit for bit.

Importing this module needs triton.

Shapes: T tokens, D input width, O output width, E experts, R LoRA rank, K experts a token, N pairs, G groups
of pairs (the E experts, and one more of the pairs without), L their limits, I rows of a layout, B blocks, M
rows of a block, X and Y widths; in a kernel, X and Y are those of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsmixer.experts.pairs import Sorted

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError as error:
    raise ImportError(
        "the fused form wants triton, which torch for CUDA brings along: `pip install triton`, or take the "
        "form `grouped` or `blocked`"
    ) from error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NARROWEST = 16
"""Of a tile, for ``tl.dot``: ranks below it are filled up with zeros."""
LONGEST = 64
"""Rows of a block at most."""


@dataclass(frozen=True)
class FusedPairs:
    """The pairs in the order of their experts, and blocks of them, each of one expert: ``Pairs``.

    Rows of pairs without an expert are zero.

    Attributes:
        pair_I: their places in the flattened ``[T, K]``.
        expert_I: the expert of each, E for none.
        shape: ``(T, K)``.
        limit_L: where the rows of each group begin, and N.
        group_B: of each block, ascending; those to spare are of the last group, behind its end.
        first_B: the first row of each block.
        block_length: M.
    """

    pair_I: torch.Tensor
    expert_I: torch.Tensor
    shape: tuple[int, int]
    limit_L: torch.Tensor
    group_B: torch.Tensor
    first_B: torch.Tensor
    block_length: int

    def take(self, bank_EXY: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The bank as it is: a kernel casts what it reads of it.

        Raises:
            ValueError: there is no kernel for its dtype or that of the products.
        """
        for wanted in (dtype, bank_EXY.dtype):
            if wanted not in DTYPES:
                raise ValueError(
                    f"the fused form multiplies float32, bfloat16 and float16, not {wanted}: take the form "
                    "`grouped` or `blocked`"
                )
        return bank_EXY

    def rows(self, x_TX: torch.Tensor) -> torch.Tensor:
        return _lined_up(x_TX)

    def of_tokens(self, rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        out_IY = rows.new_empty(len(self.pair_I), matrices.shape[2])
        self._multiply(rows, matrices, out_IY, from_tokens=True)
        return out_IY

    def to_tokens(self, left_IX: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        num_tokens, top_k = self.shape
        if not len(self.pair_I):
            return left_IX.new_zeros(num_tokens, matrices.shape[2])
        out_PY = left_IX.new_empty(len(self.pair_I), matrices.shape[2])  # in the order of [T, K]
        self._multiply(_lined_up(left_IX), matrices, out_PY, from_tokens=False)
        return out_PY if top_k == 1 else out_PY.view(num_tokens, top_k, -1).sum(1)

    def outer(self, left_IX: torch.Tensor, rows: torch.Tensor, bank_EXY: torch.Tensor) -> torch.Tensor:
        if not len(self.pair_I):
            return torch.zeros_like(bank_EXY, memory_format=torch.contiguous_format)
        grad_EXY = torch.empty_like(bank_EXY, memory_format=torch.contiguous_format)
        left_IX = _lined_up(left_IX)
        num_experts, x_width, y_width = bank_EXY.shape
        x_tile, y_tile = _tile(x_width, 64), _tile(y_width, 64)
        grid = (num_experts, triton.cdiv(x_width, x_tile), triton.cdiv(y_width, y_tile))
        with torch.cuda.device_of(rows):  # Triton takes the current device; without CUDA, this does nothing
            _outer_kernel[grid](
                left_IX,
                rows,
                grad_EXY,
                self.pair_I,
                self.limit_L,
                self.shape[1],
                x_width,
                y_width,
                left_IX.stride(0),
                rows.stride(0),
                M=min(32, self.block_length),
                TILE_X=x_tile,
                TILE_Y=y_tile,
                num_warps=4,
                num_stages=4 if rows.dtype == torch.float32 else 5,  # places, then rows at them
            )
        return grad_EXY

    def _multiply(
        self, left: torch.Tensor, matrices: torch.Tensor, out_IY: torch.Tensor, *, from_tokens: bool
    ) -> None:
        """Each row by the matrix of its expert: read at its token and written in the order of experts, or
        read in that order and written at its pair."""
        if not len(self.pair_I):
            return
        num_experts, x_width, y_width = matrices.shape
        x_tile, y_tile = _tiles(left, matrices)
        grid = (len(self.group_B), triton.cdiv(y_width, y_tile))
        with torch.cuda.device_of(left):
            _multiply_kernel[grid](
                left,
                matrices,
                out_IY,
                self.pair_I,
                self.group_B,
                self.first_B,
                self.limit_L,
                num_experts,
                self.shape[1],
                x_width,
                y_width,
                left.stride(0),
                *matrices.stride(),
                FROM_TOKENS=from_tokens,
                M=self.block_length,
                TILE_X=x_tile,
                TILE_Y=y_tile,
                num_warps=4,
                num_stages=3,
            )


def fused_pairs(ordered: Sorted) -> FusedPairs:
    """Cut the rows of each expert, and those without one, into blocks, without waiting for a device."""
    expert_N, num_experts = ordered.expert_N, ordered.num_experts
    num_pairs, num_groups, device = len(expert_N), num_experts + 1, expert_N.device
    length = _block_length(num_pairs, num_experts)
    limit_L = torch.searchsorted(expert_N, torch.arange(num_groups + 1, device=device))
    blocks_G = (limit_L.diff() + (length - 1)) // length
    last_G = blocks_G.cumsum(0)
    # each group that has rows may leave one block unfilled
    num_blocks = (num_pairs + min(num_groups, num_pairs) * (length - 1)) // length
    block_B = torch.arange(num_blocks, device=device)
    group_B = torch.searchsorted(last_G, block_B, right=True).clamp_max_(num_experts)
    shift_G = limit_L[:-1] - (last_G - blocks_G) * length
    return FusedPairs(
        pair_I=ordered.pair_N,
        expert_I=expert_N,
        shape=ordered.shape,
        limit_L=limit_L,
        group_B=group_B,
        first_B=shift_G.index_select(0, group_B) + block_B * length,
        block_length=length,
    )


def _block_length(num_pairs: int, num_experts: int) -> int:
    """As long as an expert's rows are in the mean."""
    mean = num_pairs // max(1, num_experts)
    return min(LONGEST, max(NARROWEST, triton.next_power_of_2(max(1, mean))))


def _lined_up(rows: torch.Tensor) -> torch.Tensor:
    """With the numbers of a row side by side; the rows themselves may lie anywhere, or all in one place."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _tiles(rows: torch.Tensor, matrices_EXY: torch.Tensor) -> tuple[int, int]:
    """Widths of the tiles of a product: two of each on their way take at most half of the 99 KB of shared
    memory of the smallest of these GPUs, and the sum fits the registers of four warps."""
    exact = rows.dtype == torch.float32
    y_tile = _tile(matrices_EXY.shape[2], 64 if exact else 128)
    many = exact or y_tile * matrices_EXY.element_size() > 256
    return _tile(matrices_EXY.shape[1], 32 if many else 64), y_tile


def _tile(width: int, longest: int) -> int:
    return max(NARROWEST, min(longest, triton.next_power_of_2(width)))


@triton.jit
def _multiply_kernel(
    left: torch.Tensor,
    matrices_EXY: torch.Tensor,
    out: torch.Tensor,
    pair_I: torch.Tensor,
    group_B: torch.Tensor,
    first_B: torch.Tensor,
    limit_L: torch.Tensor,
    num_experts: int,
    top_k: int,
    x_width: int,
    y_width: int,
    left_stride: int,
    matrix_stride: int,
    x_stride: int,
    y_stride: int,
    FROM_TOKENS: tl.constexpr,
    M: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_Y: tl.constexpr,
) -> None:
    """``out[i] = left[i] @ matrices[expert of i]`` for a block of rows and a tile of columns; accumulated in
    float32. Offsets are int64, as the indices are."""
    block = tl.program_id(0)
    group = tl.load(group_B + block)
    first = tl.load(first_B + block)
    end = tl.load(limit_L + group + 1)
    if first >= end:
        return
    row_M = first + tl.arange(0, M)
    here_M = row_M < end
    pair_M = tl.load(pair_I + row_M, mask=here_M, other=0)
    if FROM_TOKENS:
        from_M = pair_M // top_k
        to_M = row_M
    else:
        from_M = row_M
        to_M = pair_M
    y_Y = tl.program_id(1) * TILE_Y + tl.arange(0, TILE_Y)
    inside_Y = y_Y < y_width
    left_M1 = left + from_M[:, None] * left_stride
    matrix_1Y = matrices_EXY + group * matrix_stride + y_Y.to(tl.int64)[None, :] * y_stride
    sum_MY = tl.full((M, TILE_Y), 0.0, dtype=tl.float32)
    # pairs without an expert: nothing to add up, so zero
    width = tl.where(group < num_experts, x_width, 0)
    for start in range(0, width, TILE_X):
        x_X = start + tl.arange(0, TILE_X)
        inside_X = x_X < x_width
        left_MX = tl.load(left_M1 + x_X[None, :], mask=here_M[:, None] & inside_X[None, :], other=0.0)
        matrix_XY = tl.load(
            matrix_1Y + x_X.to(tl.int64)[:, None] * x_stride,
            mask=inside_X[:, None] & inside_Y[None, :],
            other=0.0,
        )
        sum_MY = tl.dot(left_MX, matrix_XY.to(left_MX.dtype), sum_MY, input_precision="ieee")
    tl.store(
        out + to_M[:, None] * y_width + y_Y[None, :],
        sum_MY,
        mask=here_M[:, None] & inside_Y[None, :],
    )


@triton.jit
def _outer_kernel(
    left_IX: torch.Tensor,
    right_TY: torch.Tensor,
    out_EXY: torch.Tensor,
    pair_I: torch.Tensor,
    limit_L: torch.Tensor,
    top_k: int,
    x_width: int,
    y_width: int,
    left_stride: int,
    right_stride: int,
    M: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_Y: tl.constexpr,
) -> None:
    """``out[e] = sum over its rows of left_i right_t^T`` for a tile of one expert, t the token of row i;
    accumulated in float32, in the order of the rows."""
    expert = tl.program_id(0).to(tl.int64)
    begin = tl.load(limit_L + expert)
    end = tl.load(limit_L + expert + 1)
    x_X = tl.program_id(1) * TILE_X + tl.arange(0, TILE_X)
    y_Y = tl.program_id(2) * TILE_Y + tl.arange(0, TILE_Y)
    inside_X = x_X < x_width
    inside_Y = y_Y < y_width
    sum_XY = tl.full((TILE_X, TILE_Y), 0.0, dtype=tl.float32)
    for start in range(begin, end, M):
        row_M = start + tl.arange(0, M)
        here_M = row_M < end
        token_M = tl.load(pair_I + row_M, mask=here_M, other=0) // top_k
        left_XM = tl.load(
            left_IX + row_M[None, :] * left_stride + x_X[:, None],
            mask=here_M[None, :] & inside_X[:, None],
            other=0.0,
        )
        right_MY = tl.load(
            right_TY + token_M[:, None] * right_stride + y_Y[None, :],
            mask=here_M[:, None] & inside_Y[None, :],
            other=0.0,
        )
        sum_XY = tl.dot(left_XM, right_MY, sum_XY, input_precision="ieee")
    place_X = (expert * x_width + x_X) * y_width
    tl.store(
        out_EXY + place_X[:, None] + y_Y[None, :],
        sum_XY,
        mask=inside_X[:, None] & inside_Y[None, :],
    )
