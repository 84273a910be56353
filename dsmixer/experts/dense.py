"""One wide product of all experts, or of the chosen ones, with the gate between its two factors.

Shapes: T tokens, D input width, O output width, E experts, C chosen experts, R LoRA rank, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.chosen import CHOSEN_SHARE, put, take
from dsmixer.experts.dropout import Dropout, Masked, scaling_under


def dense_form(
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    assignment: Assignment,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """``(x A_cat^T * gate) B_cat``: two wide products with the gate between them."""
    chosen_C = assignment.chosen_C
    if chosen_C is not None and len(chosen_C) > CHOSEN_SHARE * assignment.num_experts:
        chosen_C = None
    weights_TK, indices_TK = assignment.weights_TK, assignment.indices_TK
    if assignment.gate_TE is not None:
        weights_TK = assignment.gate_TE
    return _Dense.apply(x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E, chosen_C, dropout)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        a_ERD: torch.Tensor,
        b_ERO: torch.Tensor,
        weights_TK: torch.Tensor,
        indices_TK: torch.Tensor | None,
        s_E: torch.Tensor,
        chosen_C: torch.Tensor | None,
        dropout: Dropout | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E, chosen_C)
        ctx.dropout = dropout
        gate_TC = _Gate(weights_TK, indices_TK, scaling_under(s_E, dropout), chosen_C).scaled_TC1(x_TD.dtype)
        h_TCR = _wide_down(Masked(x_TD, dropout).x_TD, take(a_ERD, chosen_C, x_TD.dtype))
        h_TCR *= gate_TC
        return h_TCR.flatten(1) @ take(b_ERO, chosen_C, x_TD.dtype).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_TO,) = grads
        x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E, chosen_C = ctx.saved_tensors
        gate = _Gate(weights_TK, indices_TK, scaling_under(s_E, ctx.dropout), chosen_C)
        gate_TC1, seen = gate.scaled_TC1(x_TD.dtype), Masked(x_TD, ctx.dropout)
        a_CRD, b_CRO = (take(bank, chosen_C, x_TD.dtype) for bank in (a_ERD, b_ERO))
        h_TCR = _wide_down(seen.x_TD, a_CRD)
        up_TCR = (g_TO @ b_CRO.flatten(0, 1).T).view_as(h_TCR)
        need_x, need_a, need_b, need_weights, *_ = ctx.needs_input_grad
        weights_grad = None
        if need_weights:
            weights_grad = gate.gradient((up_TCR * h_TCR).sum(-1, dtype=weights_TK.dtype))
        a_grad = b_grad = x_grad = None
        if need_b:
            b_grad = ((h_TCR * gate_TC1).flatten(1).T @ g_TO).view_as(b_CRO)
        if need_x or need_a:
            down_TF = (up_TCR * gate_TC1).flatten(1)
            a_grad = (down_TF.T @ seen.x_TD).view_as(a_CRD) if need_a else None
            x_grad = seen.gradient(down_TF @ a_CRD.flatten(0, 1)) if need_x else None
        # last, because whole banks push everything else out of the caches
        a_grad = None if a_grad is None else put(a_grad, chosen_C, a_ERD)
        b_grad = None if b_grad is None else put(b_grad, chosen_C, b_ERO)
        return x_grad, a_grad, b_grad, weights_grad, None, None, None, None


@dataclass(frozen=True)
class _Gate:
    """The gate of the wide product, from pairs or (``indices_TK`` None) from a full gate.

    Attributes:
        weights_TK: of the pairs; ``[T, E]`` for a full gate.
        indices_TK: the experts, -1 for none.
        s_E: scaling.
        chosen_C: the experts of the product; None: all.
    """

    weights_TK: torch.Tensor
    indices_TK: torch.Tensor | None
    s_E: torch.Tensor
    chosen_C: torch.Tensor | None

    @property
    def _s_C(self) -> torch.Tensor:
        s_C = self.s_E if self.chosen_C is None else self.s_E.index_select(0, self.chosen_C)
        return s_C.to(self.weights_TK.dtype)

    def scaled_TC1(self, dtype: torch.dtype) -> torch.Tensor:
        """Weight times scaling of each token and expert."""
        gate_TC = self.weights_TK
        if self.indices_TK is not None:
            pairs = Assignment(len(self.s_E), indices_TK=self.indices_TK, weights_TK=self.weights_TK)
            gate_TC = pairs.as_gate() if self.chosen_C is None else pairs.as_gate_over(self.chosen_C)
        return (gate_TC * self._s_C).to(dtype)[:, :, None]

    def gradient(self, grad_TC: torch.Tensor) -> torch.Tensor:
        """Of the weights, from that of the scaled gate."""
        grad_TC = grad_TC * self._s_C
        if self.indices_TK is None:
            return grad_TC
        if not grad_TC.shape[1]:
            return torch.zeros_like(self.weights_TK)
        indices_TK = self.indices_TK
        slots_TK = indices_TK.clamp_min(0)
        if self.chosen_C is not None:
            slots_TK = torch.searchsorted(self.chosen_C, indices_TK)
        return grad_TC.gather(1, slots_TK) * (indices_TK >= 0)


def _wide_down(x_TD: torch.Tensor, a_CRD: torch.Tensor) -> torch.Tensor:
    """``A_e x`` of every expert in one product, ``[T, C, R]``."""
    flat_TF = x_TD @ a_CRD.flatten(0, 1).T
    return flat_TF.view(x_TD.shape[0], a_CRD.shape[0], a_CRD.shape[1])
