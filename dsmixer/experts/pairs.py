"""The pairs of a token and an expert laid out by expert, and the sum over experts by products of such rows.

Shapes: T tokens, D input width, O output width, E experts, R LoRA rank, K experts a token, N pairs, I rows of
a layout, X and Y widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.dropout import Dropout, Masked, scaling_under


@dataclass(frozen=True)
class Sorted:
    """The pairs of ``[T, K]`` in the order of their experts; those without one come last.

    Attributes:
        expert_N: ascending, E for none.
        pair_N: their places in the flattened ``[T, K]``.
        shape: ``(T, K)``.
        num_experts: E.
        seen: whether numbers can be looked at without waiting for a device.
    """

    expert_N: torch.Tensor
    pair_N: torch.Tensor
    shape: tuple[int, int]
    num_experts: int
    seen: bool

    @cached_property
    def counts_E(self) -> torch.Tensor:
        """Pairs of each expert."""
        experts_E = torch.arange(self.num_experts, device=self.expert_N.device)
        ends_E = torch.searchsorted(self.expert_N, experts_E, right=True)
        return ends_E.diff(prepend=ends_E.new_zeros(1))


def sort_pairs(indices_TK: torch.Tensor, num_experts: int) -> Sorted:
    """Sort the pairs of ``num_experts`` experts, -1 for none."""
    expert_TK = torch.where(indices_TK < 0, num_experts, indices_TK)
    expert_N, pair_N = torch.sort(expert_TK.flatten(), stable=True)
    shape = (indices_TK.shape[0], indices_TK.shape[1])
    return Sorted(expert_N, pair_N, shape, num_experts, seen=indices_TK.device.type == "cpu")


class Pairs(Protocol):
    """A layout of the pairs of ``indices_TK [T, K]``.

    Attributes:
        pair_I: the pair of each row, its place in the flattened ``[T, K]``; T*K for a row that has none.
        expert_I: the expert of each row; E for none, whose scaling is 0.
    """

    @property
    def pair_I(self) -> torch.Tensor: ...
    @property
    def expert_I(self) -> torch.Tensor: ...

    def take(self, bank_EXY: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The matrices of the products, in their dtype."""

    def rows(self, x_TX: torch.Tensor) -> torch.Tensor:
        """What ``of_tokens`` and ``outer`` read the rows' tokens from."""

    def of_tokens(self, rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """The token of each row by the matrix ``[X, Y]`` of its expert: ``[I, Y]``."""

    def to_tokens(self, left_IX: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """Each row by the matrix ``[X, Y]`` of its expert, added up for each token, ``[T, Y]``, in an order
        that is the same on every run."""

    def outer(self, left_IX: torch.Tensor, rows: torch.Tensor, bank_EXY: torch.Tensor) -> torch.Tensor:
        """The gradient of a bank: ``sum over an expert's rows of left_i token_i^T``, 0 where it has none."""


# called in both passes, so that nothing of a layout is kept between them
Layout = Callable[[Sorted], Pairs]


def by_pairs(
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    assignment: Assignment,
    dropout: Dropout | None = None,
    *,
    layout: Layout,
) -> torch.Tensor:
    """Each expert's rows, as ``layout`` lays them out, by its own two matrices: a form for each layout."""
    indices_TK, weights_TK = assignment.pairs
    y_TO: torch.Tensor = _ByPairs.apply(x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E, layout, dropout)
    return y_TO


class _ByPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        a_ERD: torch.Tensor,
        b_ERO: torch.Tensor,
        weights_TK: torch.Tensor,
        indices_TK: torch.Tensor,
        s_E: torch.Tensor,
        layout: Layout,
        dropout: Dropout | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E)
        ctx.layout, ctx.dropout = layout, dropout
        pairs = layout(sort_pairs(indices_TK, len(s_E)))
        rows = pairs.rows(Masked(x_TD, dropout).x_TD)
        h_IR = pairs.of_tokens(rows, pairs.take(a_ERD, x_TD.dtype).transpose(1, 2))
        h_IR *= _weights_I1(pairs, weights_TK, _scaling_I(pairs, s_E, dropout), x_TD.dtype)
        return pairs.to_tokens(h_IR, pairs.take(b_ERO, x_TD.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_TO,) = grads
        x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E = ctx.saved_tensors
        need_x, need_a, need_b, need_weights, *_ = ctx.needs_input_grad
        pairs, seen = ctx.layout(sort_pairs(indices_TK, len(s_E))), Masked(x_TD, ctx.dropout)
        s_I = _scaling_I(pairs, s_E, ctx.dropout)
        weights_I1 = _weights_I1(pairs, weights_TK, s_I, x_TD.dtype)
        a_taken = pairs.take(a_ERD, x_TD.dtype)
        x_grad = a_grad = b_grad = weights_grad = None
        x_rows, g_rows = pairs.rows(seen.x_TD), pairs.rows(g_TO)
        up_IR = pairs.of_tokens(g_rows, pairs.take(b_ERO, x_TD.dtype).transpose(1, 2))
        if need_b or need_weights:
            h_IR = pairs.of_tokens(x_rows, a_taken.transpose(1, 2))
            if need_weights:
                row_I = (up_IR * h_IR).sum(-1, dtype=weights_TK.dtype) * s_I.to(weights_TK.dtype)
                weights_grad = row_I.new_zeros(weights_TK.numel() + 1).scatter_(0, pairs.pair_I, row_I)
                weights_grad = weights_grad[:-1].view(weights_TK.shape)
            if need_b:
                b_grad = pairs.outer(h_IR.mul_(weights_I1), g_rows, b_ERO)
            del h_IR
        del g_rows
        down_IR = up_IR.mul_(weights_I1)
        if need_a:
            a_grad = pairs.outer(down_IR, x_rows, a_ERD)
        del x_rows
        if need_x:
            x_grad = seen.gradient(pairs.to_tokens(down_IR, a_taken))
        return x_grad, a_grad, b_grad, weights_grad, None, None, None, None


def _scaling_I(pairs: Pairs, s_E: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """The scaling of each row; 0 where it has no pair."""
    return F.pad(scaling_under(s_E, dropout), (0, 1)).index_select(0, pairs.expert_I)


def _weights_I1(
    pairs: Pairs, weights_TK: torch.Tensor, s_I: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Weight times scaling of each row."""
    weights_I = F.pad(weights_TK.flatten(), (0, 1)).index_select(0, pairs.pair_I)
    return (weights_I * s_I.to(weights_I.dtype)).to(dtype)[:, None]
