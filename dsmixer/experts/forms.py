"""Three ways to compute the same sum over experts, and the choice between them.

    y_t = sum_e gate_te * s_e * B_e A_e x_t

``loop`` is the reference. ``dense`` makes one wide product of all experts, for pools where E*R is small.
``grouped`` sorts the (token, expert) pairs by expert and multiplies each expert's own rows.

``dense`` and ``grouped`` keep for the backward pass their input, the weights of the pairs and nothing
else: the products of size T*E*R are made again. The parameters themselves are kept, not casts or views
of them, so that ZeRO-3 may release and gather them between the two passes.

Shapes: T tokens, D input width, O output width, E experts, R LoRA rank, K experts a token, N = T*K pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dsmixer.experts.assignment import Assignment

Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Assignment], torch.Tensor]

DENSE_LIMIT = 512  # E*R up to which one wide product is taken: six experts of rank 64 are 384


def choose_form(num_experts: int, rank: int) -> str:
    """``dense`` while E*R is small, ``grouped`` while it is not."""
    return "dense" if num_experts * rank <= DENSE_LIMIT else "grouped"


def loop_form(
    x_TD: torch.Tensor, a_ERD: torch.Tensor, b_ERO: torch.Tensor, s_E: torch.Tensor, assignment: Assignment
) -> torch.Tensor:
    """One expert after the other, each over all tokens: slow, plain, and what the others are held to."""
    gate_TE = assignment.as_gate()
    y_TO = x_TD.new_zeros(x_TD.shape[0], b_ERO.shape[2])
    for e in range(assignment.num_experts):
        h_TR = x_TD @ a_ERD[e].to(x_TD.dtype).T
        out_TO = h_TR @ b_ERO[e].to(x_TD.dtype)
        y_TO = y_TO + out_TO * (gate_TE[:, e, None] * s_E[e]).to(x_TD.dtype)
    return y_TO


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, a_ERD: torch.Tensor, b_ERO: torch.Tensor, gate_TE: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, a_ERD, b_ERO, gate_TE)
        h_TER = _wide_down(x_TD, a_ERD)
        h_TER *= gate_TE.to(x_TD.dtype)[:, :, None]
        return h_TER.flatten(1) @ b_ERO.to(x_TD.dtype).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_TO,) = grads
        x_TD, a_ERD, b_ERO, gate_TE = ctx.saved_tensors
        dtype = x_TD.dtype
        gate_TE1 = gate_TE.to(dtype)[:, :, None]
        h_TER = _wide_down(x_TD, a_ERD)
        up_TER = (g_TO @ b_ERO.to(dtype).flatten(0, 1).T).view_as(h_TER)
        need_x, need_a, need_b, need_gate = ctx.needs_input_grad
        gate_grad = (up_TER * h_TER).sum(-1, dtype=gate_TE.dtype) if need_gate else None
        b_grad = None
        if need_b:
            b_grad = ((h_TER * gate_TE1).flatten(1).T @ g_TO).view_as(b_ERO).to(b_ERO.dtype)
        x_grad = a_grad = None
        if need_x or need_a:
            down_TF = (up_TER * gate_TE1).flatten(1)
            x_grad = down_TF @ a_ERD.to(dtype).flatten(0, 1) if need_x else None
            a_grad = (down_TF.T @ x_TD).view_as(a_ERD).to(a_ERD.dtype) if need_a else None
        return x_grad, a_grad, b_grad, gate_grad


def _wide_down(x_TD: torch.Tensor, a_ERD: torch.Tensor) -> torch.Tensor:
    """``A_e x`` of every expert in one product, ``[T, E, R]``."""
    flat_TF = x_TD @ a_ERD.to(x_TD.dtype).flatten(0, 1).T
    return flat_TF.view(x_TD.shape[0], a_ERD.shape[0], a_ERD.shape[1])


def dense_form(
    x_TD: torch.Tensor, a_ERD: torch.Tensor, b_ERO: torch.Tensor, s_E: torch.Tensor, assignment: Assignment
) -> torch.Tensor:
    """``(x A_cat^T * gate) B_cat``: two wide products with the gate between them."""
    gate_TE = assignment.as_gate()
    return _Dense.apply(x_TD, a_ERD, b_ERO, gate_TE * s_E.to(gate_TE.dtype))


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        a_ERD: torch.Tensor,
        b_ERO: torch.Tensor,
        weights_TK: torch.Tensor,
        indices_TK: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, a_ERD, b_ERO, weights_TK, indices_TK)
        order_N, token_N, ends_E = _sort_pairs(indices_TK, a_ERD.shape[0])
        h_NR = _grouped_mm(x_TD[token_N], a_ERD.to(x_TD.dtype).transpose(1, 2), ends_E)
        h_NR = h_NR * weights_TK.flatten()[order_N].to(x_TD.dtype)[:, None]
        y_NO = _grouped_mm(h_NR, b_ERO.to(x_TD.dtype), ends_E)
        return _sum_pairs(y_NO, order_N, indices_TK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_TO,) = grads
        x_TD, a_ERD, b_ERO, weights_TK, indices_TK = ctx.saved_tensors
        dtype = x_TD.dtype
        order_N, token_N, ends_E = _sort_pairs(indices_TK, a_ERD.shape[0])
        x_ND, g_NO = x_TD[token_N], g_TO[token_N]
        weight_N1 = weights_TK.flatten()[order_N].to(dtype)[:, None]
        h_NR = _grouped_mm(x_ND, a_ERD.to(dtype).transpose(1, 2), ends_E)
        up_NR = _grouped_mm(g_NO, b_ERO.to(dtype).transpose(1, 2), ends_E)
        need_x, need_a, need_b, need_weights, _ = ctx.needs_input_grad
        weights_grad = None
        if need_weights:
            pair_N = (up_NR * h_NR).sum(-1, dtype=weights_TK.dtype)
            weights_grad = torch.empty_like(pair_N).scatter_(0, order_N, pair_N).view_as(weights_TK)
        b_grad = _grouped_outer(h_NR * weight_N1, g_NO, ends_E).to(b_ERO.dtype) if need_b else None
        down_NR = up_NR * weight_N1
        a_grad = _grouped_outer(down_NR, x_ND, ends_E).to(a_ERD.dtype) if need_a else None
        x_grad = None
        if need_x:
            x_grad = _sum_pairs(_grouped_mm(down_NR, a_ERD.to(dtype), ends_E), order_N, indices_TK)
        return x_grad, a_grad, b_grad, weights_grad, None


def _sort_pairs(
    indices_TK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs in the order of their experts: positions ``[N]``, tokens ``[N]``, ends of the experts ``[E]``."""
    flat_N = indices_TK.flatten()
    order_N = torch.argsort(flat_N, stable=True)
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=flat_N.device)
    counts_E.index_add_(0, flat_N, torch.ones_like(flat_N, dtype=torch.int32))
    return order_N, order_N // indices_TK.shape[1], counts_E.cumsum(0, dtype=torch.int32)


def _sum_pairs(rows_NX: torch.Tensor, order_N: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """Bring sorted pair rows back to their tokens and add the K of each, in a fixed order."""
    unsorted_NX = torch.empty_like(rows_NX)
    unsorted_NX[order_N] = rows_NX
    return unsorted_NX.view(*indices_TK.shape, rows_NX.shape[1]).sum(1)


def _grouped_mm(rows_NX: torch.Tensor, weights_EXY: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """``rows[i] @ weights[expert of i]`` for rows sorted by expert, ``[N, Y]``."""
    if _has_grouped_kernel(rows_NX, *weights_EXY.shape[1:]):
        return F.grouped_mm(rows_NX.contiguous(), weights_EXY, offs=ends_E)
    out_NY = rows_NX.new_empty(rows_NX.shape[0], weights_EXY.shape[2])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        out_NY[start:end] = rows_NX[start:end] @ weights_EXY[e]
        start = end
    return out_NY


def _grouped_outer(left_NX: torch.Tensor, right_NY: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """``sum over an expert's rows of left_i right_i^T``, ``[E, X, Y]``; zero where it has none."""
    if _has_grouped_kernel(left_NX, left_NX.shape[1], right_NY.shape[1]):
        return F.grouped_mm(left_NX.contiguous().T, right_NY.contiguous(), offs=ends_E)
    out_EXY = left_NX.new_zeros(ends_E.shape[0], left_NX.shape[1], right_NY.shape[1])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        out_EXY[e] = left_NX[start:end].T @ right_NY[start:end]
        start = end
    return out_EXY


def _has_grouped_kernel(rows_NX: torch.Tensor, *widths: int) -> bool:
    """``F.grouped_mm`` takes float32 and bfloat16, rows of whole 16 bytes, and at least one row."""
    if rows_NX.dtype not in (torch.float32, torch.bfloat16) or rows_NX.shape[0] == 0:
        return False
    return all(width * rows_NX.element_size() % 16 == 0 for width in widths)


def grouped_form(
    x_TD: torch.Tensor, a_ERD: torch.Tensor, b_ERO: torch.Tensor, s_E: torch.Tensor, assignment: Assignment
) -> torch.Tensor:
    """Sort the pairs by expert and multiply each expert's rows by its own two matrices."""
    indices_TK, weights_TK = assignment.as_pairs()
    weights_TK = weights_TK * s_E.to(weights_TK.dtype)[indices_TK]
    return _Grouped.apply(x_TD, a_ERD, b_ERO, weights_TK, indices_TK)


forms: dict[str, Form] = {"loop": loop_form, "dense": dense_form, "grouped": grouped_form}
