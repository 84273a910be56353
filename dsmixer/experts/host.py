"""The pairs of a token and an expert multiplied where they lie, by kernels in C++ for the CPU.

A thread takes rows of one expert and reads their tokens at their places, and a bank in its own dtype, so that
neither is copied; sums are float32. Every number is the work of one thread, in a fixed order: a run is the
same bit for bit, on any number of threads.

Shapes: T tokens, E experts, K experts a token, I pairs that have an expert, L their limits, X and Y widths.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsmixer.config.errors import UserError
from dsmixer.experts.host_library import HostLibraryError, has_host_library, host_library
from dsmixer.experts.pairs import Sorted

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Of rows and of banks, in any pair."""


def can_multiply(*dtypes: torch.dtype) -> bool:
    """Whether there are kernels, here, for rows and banks of these dtypes."""
    return all(dtype in NAMES for dtype in dtypes) and has_host_library()


@dataclass(frozen=True)
class HostPairs:
    """The pairs that have an expert, in the order of their experts: ``Pairs``.

    Attributes:
        pair_I: their places in the flattened ``[T, K]``.
        expert_I: the expert of each.
        token_I: the token of each.
        limit_L: where the rows of each expert begin, and the end of the last, ``[E + 1]``.
        num_tokens: T.
    """

    pair_I: torch.Tensor
    expert_I: torch.Tensor
    token_I: torch.Tensor
    limit_L: torch.Tensor
    num_tokens: int

    def take(self, bank_EXY: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The bank as it is: a kernel widens what it reads of it.

        Raises:
            ValueError: there is no kernel for its dtype or that of the rows.
        """
        for wanted in (dtype, bank_EXY.dtype):
            if wanted not in NAMES:
                raise ValueError(
                    f"the fused form on the CPU multiplies float32 and bfloat16, not {wanted}: take the form "
                    "`grouped` or `blocked`"
                )
        return bank_EXY

    def rows(self, x_TX: torch.Tensor) -> torch.Tensor:
        return _lined_up(x_TX)

    def of_tokens(self, rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        _, depth, columns = matrices.shape
        assert rows.shape[1] == depth, (rows.shape, matrices.shape)
        bank_EYX = _lined_up(matrices.transpose(1, 2))
        out_IY = rows.new_empty(len(self.pair_I), columns)
        strides = bank_EYX.stride()[:2]
        self._multiply(
            "of_tokens", depth, columns, bank_EYX, rows, rows.stride(0), bank_EYX, *strides, out_IY
        )
        return out_IY

    def to_tokens(self, left_IX: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        _, depth, columns = matrices.shape
        assert left_IX.shape == (len(self.pair_I), depth), (left_IX.shape, matrices.shape)
        bank_EXY = _lined_up(matrices)
        out_TY = left_IX.new_zeros(self.num_tokens, columns, dtype=torch.float32)
        strides = bank_EXY.stride()[:2]
        self._multiply(
            "to_tokens", depth, columns, bank_EXY, left_IX.contiguous(), bank_EXY, *strides, out_TY
        )
        return out_TY.to(left_IX.dtype)

    def outer(self, left_IX: torch.Tensor, rows: torch.Tensor, bank_EXY: torch.Tensor) -> torch.Tensor:
        _, depth, columns = bank_EXY.shape
        assert left_IX.shape == (len(self.pair_I), depth) and rows.shape[1] == columns, (
            left_IX.shape,
            rows.shape,
        )
        assert left_IX.dtype == rows.dtype, (left_IX.dtype, rows.dtype)
        grad_EXY = torch.empty_like(bank_EXY, memory_format=torch.contiguous_format)
        left_IX = left_IX.contiguous()
        self._multiply("outer", depth, columns, grad_EXY, rows, rows.stride(0), left_IX, grad_EXY)
        return grad_EXY

    def _multiply(
        self, name: str, depth: int, columns: int, bank: torch.Tensor, *operands: torch.Tensor | int
    ) -> None:
        """The kernel for the dtypes of the rows, which come first, and of the bank; X and Y are its sizes."""
        rows = operands[0]
        assert isinstance(rows, torch.Tensor)
        sizes = len(self.limit_L) - 1, depth, columns, torch.get_num_threads()
        _call(name, rows.dtype, bank.dtype, *operands, self.token_I, self.limit_L, *sizes)


def host_pairs(ordered: Sorted) -> HostPairs:
    """Leave out the pairs without an expert.

    Raises:
        UserError: there are no kernels here.
    """
    try:
        host_library()
    except HostLibraryError as error:
        fix = "see what `dsmixer doctor` says of the compiler, or take `auto`"
        raise UserError(f"the fused form has no kernels: {error}", where="mixer.compute", fix=fix) from error
    limit_L = F.pad(ordered.counts_E.cumsum(0), (1, 0))
    present = int(limit_L[-1])
    pair_I, (num_tokens, top_k) = ordered.pair_N[:present], ordered.shape
    return HostPairs(pair_I, ordered.expert_N[:present], pair_I // max(1, top_k), limit_L, num_tokens)


def add_answers(
    y_TO: torch.Tensor,
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    indices_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> None:
    """Add ``sum_k w_tk s_e B_e A_e x_t`` to ``y_TO`` in place, for a few tokens and without gradients.

    Args:
        y_TO: contiguous, of the dtype of ``x_TD``.
        x_TD: the tokens.
        a_ERD, b_ERO: the bank, contiguous, of float32 or bfloat16.
        s_E: scaling, float32.
        indices_TK: experts of each token; -1 for none.
        weights_TK: their weights, float32.

    Raises:
        IndexError: an index names no expert.
    """
    (num_experts, rank, depth), (num_tokens, top_k) = a_ERD.shape, indices_TK.shape
    width = b_ERO.shape[2]
    # a kernel believes what it is told
    assert x_TD.shape == (num_tokens, depth) and y_TO.shape == (num_tokens, width), (x_TD.shape, y_TO.shape)
    assert b_ERO.shape[:2] == (num_experts, rank) and s_E.shape == (num_experts,), (b_ERO.shape, s_E.shape)
    assert x_TD.dtype == y_TO.dtype and a_ERD.dtype == b_ERO.dtype, (x_TD.dtype, y_TO.dtype, b_ERO.dtype)
    assert s_E.dtype == weights_TK.dtype == torch.float32, (s_E.dtype, weights_TK.dtype)
    assert all(of.is_contiguous() for of in (y_TO, a_ERD, b_ERO, s_E)), "not contiguous"
    x_TD, indices_TK, weights_TK = _lined_up(x_TD), indices_TK.long().contiguous(), weights_TK.contiguous()
    given = x_TD, x_TD.stride(0), a_ERD, b_ERO, s_E, indices_TK, weights_TK, y_TO
    sizes = num_tokens, top_k, num_experts, rank, depth, width, torch.get_num_threads()
    if _call("answer", x_TD.dtype, a_ERD.dtype, *given, *sizes):
        raise IndexError(f"an index is above {num_experts - 1}, the last expert")


def pull_rows(
    grad_NX: torch.Tensor,
    away: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``pull_n (w_n - o_n)`` to each row of a gradient in place, and measure it, all in one pass.

    Args:
        grad_NX: contiguous, float32.
        away: ``w_NX``, ``o_NX``, like it, and ``pull_N``; None: the gradient is only measured.

    Returns:
        of each row, the squared norm of its gradient then, and of ``w - o``, 0 where it is not pulled.
    """
    (num_rows, width), nothing = grad_NX.shape, grad_NX.new_zeros(0)
    given = (grad_NX, *(away or (grad_NX, grad_NX)))
    # a kernel believes what it is told
    assert all(of.dtype == torch.float32 and of.is_contiguous() for of in given), [of.dtype for of in given]
    assert all(of.shape == grad_NX.shape for of in given[:3]), [of.shape for of in given]
    assert away is None or away[2].shape == (num_rows,), away[2].shape
    squares_N, moves_N = grad_NX.new_empty(num_rows), grad_NX.new_empty(num_rows)
    operands = (*given, *(() if away else (nothing,)), squares_N, moves_N)
    _call("hold", torch.float32, torch.float32, *operands, num_rows, width, torch.get_num_threads())
    return squares_N, moves_N


def _call(name: str, rows: torch.dtype, bank: torch.dtype, *arguments: torch.Tensor | int) -> int:
    """A kernel by addresses and numbers, and what it returns; the lock of Python is free meanwhile."""
    kernel = getattr(host_library(), f"{name}_{NAMES[rows]}_{NAMES[bank]}")
    returned: int = kernel(
        *(
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else ctypes.c_int64(value)
            for value in arguments
        )
    )
    return returned


def _lined_up(rows: torch.Tensor) -> torch.Tensor:
    """With the numbers of a row side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()
