"""The pairs of a token and an expert sorted by expert, each expert's rows multiplied by its own two matrices.

Shapes: T tokens, D input width, O output width, E experts, C chosen experts, R LoRA rank, K experts a token,
N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.chosen import put, take
from dsmixer.experts.dropout import Dropout, Masked, scaling_under


def grouped_form(
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    assignment: Assignment,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Sort the pairs by expert and multiply each expert's rows by its own two matrices."""
    weights_TK, indices_TK = assignment.weights_TK, assignment.indices_TK
    if indices_TK is None:
        indices_TK, weights_TK = assignment.as_pairs()
    chosen_C, num_experts = assignment.chosen_C, assignment.num_experts
    num_chosen = min(num_experts, indices_TK.numel()) if chosen_C is None else len(chosen_C)
    return _Grouped.apply(x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E, num_chosen, dropout)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        a_ERD: torch.Tensor,
        b_ERO: torch.Tensor,
        weights_TK: torch.Tensor,
        indices_TK: torch.Tensor,
        s_E: torch.Tensor,
        num_chosen: int,
        dropout: Dropout | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E)
        ctx.num_chosen, ctx.dropout = num_chosen, dropout
        pairs = _sort_pairs(indices_TK, a_ERD.shape[0], num_chosen)
        a_CRD, b_CRO = (take(bank, pairs.chosen_C, x_TD.dtype) for bank in (a_ERD, b_ERO))
        x_ND = pairs.rows_of(Masked(x_TD, dropout).x_TD)
        h_NR = _grouped_mm(x_ND, a_CRD.transpose(1, 2), pairs.ends_C)
        h_NR = h_NR * pairs.weights_N1(weights_TK, pairs.scaling_N(scaling_under(s_E, dropout)), x_TD.dtype)
        return pairs.sum(_grouped_mm(h_NR, b_CRO, pairs.ends_C))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_TO,) = grads
        x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E = ctx.saved_tensors
        pairs = _sort_pairs(indices_TK, a_ERD.shape[0], ctx.num_chosen)
        chosen_C, ends_C = pairs.chosen_C, pairs.ends_C
        a_CRD, b_CRO = (take(bank, chosen_C, x_TD.dtype) for bank in (a_ERD, b_ERO))
        seen, g_NO = Masked(x_TD, ctx.dropout), pairs.rows_of(g_TO)
        x_ND = pairs.rows_of(seen.x_TD)
        s_N = pairs.scaling_N(scaling_under(s_E, ctx.dropout))
        weight_N1 = pairs.weights_N1(weights_TK, s_N, x_TD.dtype)
        h_NR = _grouped_mm(x_ND, a_CRD.transpose(1, 2), ends_C)
        up_NR = _grouped_mm(g_NO, b_CRO.transpose(1, 2), ends_C)
        need_x, need_a, need_b, need_weights, *_ = ctx.needs_input_grad
        weights_grad = None
        if need_weights:
            pair_N = (up_NR * h_NR).sum(-1, dtype=weights_TK.dtype) * s_N.to(weights_TK.dtype)
            weights_grad = torch.zeros_like(weights_TK, memory_format=torch.contiguous_format)
            weights_grad.view(-1).scatter_(0, pairs.order_N, pair_N)
        b_grad = _grouped_outer(h_NR * weight_N1, g_NO, ends_C) if need_b else None
        down_NR = up_NR * weight_N1
        a_grad = _grouped_outer(down_NR, x_ND, ends_C) if need_a else None
        x_grad = seen.gradient(pairs.sum(_grouped_mm(down_NR, a_CRD, ends_C))) if need_x else None
        a_grad, b_grad = put(a_grad, chosen_C, a_ERD), put(b_grad, chosen_C, b_ERO)
        return x_grad, a_grad, b_grad, weights_grad, None, None, None, None


@dataclass(frozen=True)
class _Pairs:
    """The pairs in the order of their experts.

    Attributes:
        order_N: their places in the flattened ``[T, K]``.
        expert_N: the expert of each, E for none.
        top_k: K.
        num_tokens: T.
        chosen_C: the experts, int64; None: all of the bank.
        ends_C: where the pairs of each expert end, int32.
    """

    order_N: torch.Tensor
    expert_N: torch.Tensor
    top_k: int
    num_tokens: int
    chosen_C: torch.Tensor | None
    ends_C: torch.Tensor

    def rows_of(self, x_TX: torch.Tensor) -> torch.Tensor:
        """The token of each pair, ``[N, X]``."""
        return x_TX.index_select(0, self.order_N // self.top_k)

    def scaling_N(self, s_E: torch.Tensor) -> torch.Tensor:
        """The scaling of each pair; zero where there is no expert."""
        return F.pad(s_E, (0, 1)).index_select(0, self.expert_N)

    def weights_N1(self, weights_TK: torch.Tensor, s_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Weight times scaling of each pair."""
        weights_N = weights_TK.flatten().index_select(0, self.order_N)
        return (weights_N * s_N.to(weights_N.dtype)).to(dtype)[:, None]

    def sum(self, rows_NX: torch.Tensor) -> torch.Tensor:
        """Add the pairs of each token in the order of its choices, ``[T, X]``: the same on every run."""
        if not len(rows_NX):
            return rows_NX.new_zeros(self.num_tokens, rows_NX.shape[1])
        place_N = torch.argsort(self.order_N)
        firsts_T = torch.arange(self.num_tokens, device=rows_NX.device) * self.top_k
        starts_T = torch.searchsorted(self.order_N.index_select(0, place_N), firsts_T)
        return F.embedding_bag(place_N, rows_NX, starts_T, mode="sum")


def _sort_pairs(indices_TK: torch.Tensor, num_experts: int, num_chosen: int) -> _Pairs:
    """Sort the pairs of ``num_experts`` experts, of which at most ``num_chosen`` are named.

    Pairs without an expert (-1) come last. On the CPU they are left out; on a device their number is not
    known, and they go with the last expert, at their scaling of zero.
    """
    expert_TK = torch.where(indices_TK < 0, num_experts, indices_TK)
    expert_N, order_N = torch.sort(expert_TK.flatten(), stable=True)
    if expert_N.device.type == "cpu":
        present = int(torch.searchsorted(expert_N, num_experts))
        expert_N, order_N = expert_N[:present], order_N[:present]
    slot_N, chosen_C = expert_N.clamp_max(num_experts - 1), None
    if num_chosen < num_experts:
        chosen_C, slot_N = _number(slot_N, num_chosen)
    slots_C = torch.arange(num_chosen, device=slot_N.device)
    ends_C = torch.searchsorted(slot_N, slots_C, right=True, out_int32=True)
    return _Pairs(order_N, expert_N, indices_TK.shape[1], indices_TK.shape[0], chosen_C, ends_C)


def _number(expert_N: torch.Tensor, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The different experts of a sorted list, ``[C]``, and for each entry its place among them, ``[N]``."""
    new_N = torch.ones_like(expert_N)
    new_N[1:] = expert_N[1:] != expert_N[:-1]
    slot_N = new_N.cumsum(0) - 1
    return expert_N.new_zeros(num_chosen).scatter_(0, slot_N, expert_N), slot_N


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
