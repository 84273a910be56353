"""Three ways to compute the same sum over experts, and the choice between them.

    y_t = sum_e gate_te * s_e * B_e A_e x_t

``loop`` is the reference. ``dense`` makes one wide product of all experts, for pools where E*R is small.
``grouped`` sorts the (token, expert) pairs by expert and multiplies each expert's own rows.

``dense`` and ``grouped`` keep for the backward pass their input, the weights of the pairs and which experts
they name, and nothing else: the products of size T*E*R are made again. The parameters themselves are kept,
not casts or views of them, so that ZeRO-3 may release and gather them between the two passes.

Both take from a bank only the C experts that the pairs name, so that their cost follows the chosen experts
and not the pool. On the CPU C is counted. On a device a count would make the host wait: C is then a bound,
the number of pairs, and where that is no less than E the whole bank is taken as it is. What still grows with
the pool is the zeros of a gradient that has the shape of the bank (``empty_gradient``).

Shapes: T tokens, D input width, O output width, E experts, C chosen experts, R LoRA rank, K experts a token,
N pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dsmixer.experts.assignment import Assignment

Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Assignment], torch.Tensor]

DENSE_LIMIT = 512  # E*R up to which one wide product is taken: six experts of rank 64 are 384


def choose_form(num_experts: int, rank: int) -> str:
    """``dense`` while E*R is small, ``grouped`` while it is not."""
    return "dense" if num_experts * rank <= DENSE_LIMIT else "grouped"


def auto_form(
    x_TD: torch.Tensor, a_ERD: torch.Tensor, b_ERO: torch.Tensor, s_E: torch.Tensor, assignment: Assignment
) -> torch.Tensor:
    """The form that suits the pool or, in a large one, the experts that were chosen."""
    num_experts, rank = a_ERD.shape[:2]
    form = choose_form(num_experts, rank)
    if form != "dense" and assignment.chosen_C is not None:
        form = choose_form(len(assignment.chosen_C), rank)
    return forms[form](x_TD, a_ERD, b_ERO, s_E, assignment)


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


def take(bank_EXY: torch.Tensor, chosen_C: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The chosen experts of a bank in the dtype of the products, ``[C, X, Y]``; None: all of them."""
    return (bank_EXY if chosen_C is None else bank_EXY.index_select(0, chosen_C)).to(dtype)


def put(
    grad_CXY: torch.Tensor | None, chosen_C: torch.Tensor | None, bank_EXY: torch.Tensor
) -> torch.Tensor | None:
    """The gradient of a bank from that of its chosen experts, ``[E, X, Y]``; the others' is zero."""
    if grad_CXY is None:
        return None
    grad_CXY = grad_CXY.to(bank_EXY.dtype)
    if chosen_C is None:
        return grad_CXY
    # where C is a bound, slots to spare name expert 0 with a gradient of zero: so they are added
    return empty_gradient(bank_EXY).index_add_(0, chosen_C, grad_CXY)


def empty_gradient(bank_EXY: torch.Tensor) -> torch.Tensor:
    """Zeros for a whole bank: the one pass of a form over the pool."""
    return torch.zeros_like(bank_EXY, memory_format=torch.contiguous_format)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        a_ERD: torch.Tensor,
        b_ERO: torch.Tensor,
        gate_TC: torch.Tensor,
        chosen_C: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, a_ERD, b_ERO, gate_TC, chosen_C)
        h_TCR = _wide_down(x_TD, take(a_ERD, chosen_C, x_TD.dtype))
        h_TCR *= gate_TC.to(x_TD.dtype)[:, :, None]
        return h_TCR.flatten(1) @ take(b_ERO, chosen_C, x_TD.dtype).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_TO,) = grads
        x_TD, a_ERD, b_ERO, gate_TC, chosen_C = ctx.saved_tensors
        a_CRD, b_CRO = (take(bank, chosen_C, x_TD.dtype) for bank in (a_ERD, b_ERO))
        gate_TC1 = gate_TC.to(x_TD.dtype)[:, :, None]
        h_TCR = _wide_down(x_TD, a_CRD)
        up_TCR = (g_TO @ b_CRO.flatten(0, 1).T).view_as(h_TCR)
        need_x, need_a, need_b, need_gate, _ = ctx.needs_input_grad
        gate_grad = (up_TCR * h_TCR).sum(-1, dtype=gate_TC.dtype) if need_gate else None
        a_grad = b_grad = x_grad = None
        if need_b:
            b_grad = ((h_TCR * gate_TC1).flatten(1).T @ g_TO).view_as(b_CRO)
        if need_x or need_a:
            down_TF = (up_TCR * gate_TC1).flatten(1)
            a_grad = (down_TF.T @ x_TD).view_as(a_CRD) if need_a else None
            x_grad = down_TF @ a_CRD.flatten(0, 1) if need_x else None
        # last, because whole banks push everything else out of the caches
        a_grad, b_grad = put(a_grad, chosen_C, a_ERD), put(b_grad, chosen_C, b_ERO)
        return x_grad, a_grad, b_grad, gate_grad, None


def _wide_down(x_TD: torch.Tensor, a_CRD: torch.Tensor) -> torch.Tensor:
    """``A_e x`` of every expert in one product, ``[T, C, R]``."""
    flat_TF = x_TD @ a_CRD.flatten(0, 1).T
    return flat_TF.view(x_TD.shape[0], a_CRD.shape[0], a_CRD.shape[1])


def dense_form(
    x_TD: torch.Tensor, a_ERD: torch.Tensor, b_ERO: torch.Tensor, s_E: torch.Tensor, assignment: Assignment
) -> torch.Tensor:
    """``(x A_cat^T * gate) B_cat``: two wide products with the gate between them."""
    chosen_C = None
    if choose_form(*a_ERD.shape[:2]) != "dense":
        chosen_C = assignment.chosen_C
    gate_TC = assignment.as_gate() if chosen_C is None else assignment.as_gate_over(chosen_C)
    s_C = s_E if chosen_C is None else s_E.index_select(0, chosen_C)
    return _Dense.apply(x_TD, a_ERD, b_ERO, gate_TC * s_C.to(gate_TC.dtype), chosen_C)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        a_ERD: torch.Tensor,
        b_ERO: torch.Tensor,
        weights_TK: torch.Tensor,
        indices_TK: torch.Tensor,
        num_chosen: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, a_ERD, b_ERO, weights_TK, indices_TK)
        ctx.num_chosen = num_chosen
        pairs = _sort_pairs(indices_TK, a_ERD.shape[0], num_chosen)
        a_CRD, b_CRO = (take(bank, pairs.chosen_C, x_TD.dtype) for bank in (a_ERD, b_ERO))
        h_NR = _grouped_mm(pairs.rows_of(x_TD), a_CRD.transpose(1, 2), pairs.ends_C)
        h_NR = h_NR * pairs.weights_N1(weights_TK, x_TD.dtype)
        return pairs.sum(_grouped_mm(h_NR, b_CRO, pairs.ends_C))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_TO,) = grads
        x_TD, a_ERD, b_ERO, weights_TK, indices_TK = ctx.saved_tensors
        pairs = _sort_pairs(indices_TK, a_ERD.shape[0], ctx.num_chosen)
        chosen_C, ends_C = pairs.chosen_C, pairs.ends_C
        a_CRD, b_CRO = (take(bank, chosen_C, x_TD.dtype) for bank in (a_ERD, b_ERO))
        x_ND, g_NO = pairs.rows_of(x_TD), pairs.rows_of(g_TO)
        weight_N1 = pairs.weights_N1(weights_TK, x_TD.dtype)
        h_NR = _grouped_mm(x_ND, a_CRD.transpose(1, 2), ends_C)
        up_NR = _grouped_mm(g_NO, b_CRO.transpose(1, 2), ends_C)
        need_x, need_a, need_b, need_weights, *_ = ctx.needs_input_grad
        weights_grad = None
        if need_weights:
            pair_N = (up_NR * h_NR).sum(-1, dtype=weights_TK.dtype)
            weights_grad = torch.zeros_like(weights_TK, memory_format=torch.contiguous_format)
            weights_grad.view(-1).scatter_(0, pairs.order_N, pair_N)
        b_grad = _grouped_outer(h_NR * weight_N1, g_NO, ends_C) if need_b else None
        down_NR = up_NR * weight_N1
        a_grad = _grouped_outer(down_NR, x_ND, ends_C) if need_a else None
        x_grad = pairs.sum(_grouped_mm(down_NR, a_CRD, ends_C)) if need_x else None
        a_grad, b_grad = put(a_grad, chosen_C, a_ERD), put(b_grad, chosen_C, b_ERO)
        return x_grad, a_grad, b_grad, weights_grad, None, None


@dataclass(frozen=True)
class _Pairs:
    """The pairs in the order of their experts.

    Attributes:
        order_N: their places in the flattened ``[T, K]``.
        top_k: K.
        num_tokens: T.
        chosen_C: the experts, int64; None: all of the bank.
        ends_C: where the pairs of each expert end, int32.
    """

    order_N: torch.Tensor
    top_k: int
    num_tokens: int
    chosen_C: torch.Tensor | None
    ends_C: torch.Tensor

    def rows_of(self, x_TX: torch.Tensor) -> torch.Tensor:
        """The token of each pair, ``[N, X]``."""
        return x_TX.index_select(0, self.order_N // self.top_k)

    def weights_N1(self, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return weights_TK.flatten().index_select(0, self.order_N).to(dtype)[:, None]

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

    Pairs without an expert have the index E and come last. On the CPU they are left out; on a device their
    number is not known, and they go with the last expert, at their weight of zero.
    """
    expert_N, order_N = torch.sort(indices_TK.flatten(), stable=True)
    if expert_N.device.type == "cpu":
        present = int(torch.searchsorted(expert_N, num_experts))
        expert_N, order_N = expert_N[:present], order_N[:present]
    slot_N, chosen_C = expert_N.clamp_max(num_experts - 1), None
    if num_chosen < num_experts:
        chosen_C, slot_N = _number(slot_N, num_chosen)
    slots_C = torch.arange(num_chosen, device=slot_N.device)
    ends_C = torch.searchsorted(slot_N, slots_C, right=True, out_int32=True)
    return _Pairs(order_N, indices_TK.shape[1], indices_TK.shape[0], chosen_C, ends_C)


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


def grouped_form(
    x_TD: torch.Tensor, a_ERD: torch.Tensor, b_ERO: torch.Tensor, s_E: torch.Tensor, assignment: Assignment
) -> torch.Tensor:
    """Sort the pairs by expert and multiply each expert's rows by its own two matrices."""
    indices_TK, weights_TK = assignment.as_pairs()
    weights_TK = weights_TK * s_E.to(weights_TK.dtype)[indices_TK]
    chosen_C, num_experts = assignment.chosen_C, assignment.num_experts
    num_chosen = min(num_experts, indices_TK.numel()) if chosen_C is None else len(chosen_C)
    if assignment.indices_TK is not None:
        indices_TK = torch.where(assignment.indices_TK < 0, num_experts, indices_TK)
    return _Grouped.apply(x_TD, a_ERD, b_ERO, weights_TK, indices_TK, num_chosen)


forms: dict[str, Form] = {"loop": loop_form, "dense": dense_form, "grouped": grouped_form}
