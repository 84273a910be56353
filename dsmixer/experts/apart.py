"""What the experts of a token put out, each by itself: for losses on these outputs.

No compute form makes them: ``dense`` and ``grouped`` answer with the weighted sum. Here a loss of one number
a token is summed over tokens, some of them at a time, and nothing is kept for the backward pass but what the
form of the same mixer keeps anyway: the input, the weights of the pairs, their experts. The outputs are made
again there, so that never more than ``BLOCK_ELEMENTS`` of them are alive, with their gradient.

Shapes: T tokens, t of them at a time, D input width, O output width, E experts, R LoRA rank, K experts a
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.dropout import Dropout, Masked, scaling_under
from dsmixer.experts.few import SMALL_POOL
from dsmixer.experts.forms import Form

BLOCK_ELEMENTS = 2**22
"""Outputs that are alive at a time: tokens x experts a token x the larger width of the projection."""

# (outputs_TKO in float32 or float64, chosen_TK bool) -> one number a token, [T]
PerToken = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Outputs:
    """How the outputs of a bank are made.

    Attributes:
        form: of the products.
        dropout: of the input.
        block_elements: outputs that are alive at a time.
    """

    form: Form
    dropout: Dropout | None = None
    block_elements: int = BLOCK_ELEMENTS

    def blocks(self, a_ERD: torch.Tensor, b_ERO: torch.Tensor, weights_TK: torch.Tensor) -> Iterator[slice]:
        """The tokens, some at a time; at least one."""
        num_experts, rank, in_features = a_ERD.shape
        # the wide product of a small pool is as wide as that for every pair
        width = max(in_features, b_ERO.shape[2], min(num_experts * rank, SMALL_POOL))
        length = max(1, self.block_elements // (width * weights_TK.shape[1]))
        for first in range(0, len(weights_TK), length):
            yield slice(first, first + length)

    def of(
        self,
        x_tD: torch.Tensor,
        a_ERD: torch.Tensor,
        b_ERO: torch.Tensor,
        s_E: torch.Tensor,
        indices_tK: torch.Tensor,
    ) -> torch.Tensor:
        """``s_e B_e A_e x`` of every pair, ``[t, K, O]``, in float32 at least: each pair as a token with one
        expert of weight 1."""
        num_tokens, top_k = indices_tK.shape
        wide = torch.promote_types(x_tD.dtype, torch.float32)
        ones_N1 = torch.ones(num_tokens * top_k, 1, dtype=wide, device=x_tD.device)
        pairs = Assignment(len(a_ERD), indices_TK=indices_tK.reshape(-1, 1), weights_TK=ones_N1)
        out_NO = self.form(x_tD.repeat_interleave(top_k, 0), a_ERD, b_ERO, s_E, pairs, None)
        return out_NO.view(num_tokens, top_k, -1).to(wide)


def sum_apart(
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    assignment: Assignment,
    per_token: PerToken,
    mask_T: torch.Tensor | None,
    how: Outputs,
) -> torch.Tensor:
    """``sum_x per_token(outputs(x), chosen(x))`` over real tokens, a scalar.

    The gradient reaches ``A``, ``B`` and the input, and no weight: outputs are taken before their weights. An
    expert is chosen where its weight is above 0; a pair without an expert is not.

    Args:
        x_TD: the tokens.
        a_ERD, b_ERO: the bank.
        s_E: its scaling.
        assignment: the experts of each token; of a full gate all are made, chosen or not.
        per_token: the loss.
        mask_T: 1 for real tokens, 0 for padding; None: all are real.
        how: the outputs are made.
    """
    weights_TK = assignment.weights_TK if assignment.gate_TE is None else assignment.gate_TE
    assert weights_TK is not None
    saved = (x_TD, a_ERD, b_ERO, weights_TK.detach(), assignment.indices_TK, s_E, mask_T)
    total: torch.Tensor = _SumApart.apply(*saved, per_token, how)
    return total


class _SumApart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        a_ERD: torch.Tensor,
        b_ERO: torch.Tensor,
        weights_TK: torch.Tensor,
        indices_TK: torch.Tensor | None,
        s_E: torch.Tensor,
        mask_T: torch.Tensor | None,
        per_token: PerToken,
        how: Outputs,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E, mask_T)
        ctx.per_token, ctx.how = per_token, how
        pairs, scaling = _Pairs(weights_TK, indices_TK, mask_T), scaling_under(s_E, how.dropout)
        seen_TD = Masked(x_TD, how.dropout).x_TD
        total = torch.zeros((), dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device)
        with torch.autocast(x_TD.device.type, enabled=False):
            for rows in how.blocks(a_ERD, b_ERO, weights_TK):
                outputs_tKO = how.of(seen_TD[rows], a_ERD, b_ERO, scaling, pairs.indices(rows))
                total = total + pairs.sum(per_token, outputs_tKO, rows)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, a_ERD, b_ERO, weights_TK, indices_TK, s_E, mask_T = ctx.saved_tensors
        how, (need_x, *need_banks) = ctx.how, ctx.needs_input_grad[:3]
        pairs, scaling = _Pairs(weights_TK, indices_TK, mask_T), scaling_under(s_E, how.dropout)
        seen = Masked(x_TD, how.dropout)
        banks = [bank.detach().requires_grad_(n) for bank, n in zip((a_ERD, b_ERO), need_banks, strict=True)]
        wanted = [bank for bank in banks if bank.requires_grad]
        sums = [torch.zeros_like(bank, memory_format=torch.contiguous_format) for bank in wanted]
        x_grad = torch.zeros_like(x_TD, memory_format=torch.contiguous_format) if need_x else None
        with torch.enable_grad(), torch.autocast(x_TD.device.type, enabled=False):
            for rows in how.blocks(a_ERD, b_ERO, weights_TK):
                x_tD = seen.x_TD[rows].detach().requires_grad_(need_x)
                outputs_tKO = how.of(x_tD, *banks, scaling, pairs.indices(rows))
                value = pairs.sum(ctx.per_token, outputs_tKO, rows)
                leaves = [*wanted, x_tD] if need_x else wanted
                found = list(torch.autograd.grad(value, leaves, grads[0]))
                if x_grad is not None:
                    x_grad[rows] = found.pop()
                for total, part in zip(sums, found, strict=True):
                    total += part
        bank_grads = [sums.pop(0) if needed else None for needed in need_banks]
        return seen.gradient(x_grad), *bank_grads, None, None, None, None, None, None


@dataclass(frozen=True)
class _Pairs:
    """The pairs of all tokens, or (``indices_TK`` None) a full gate, and which tokens are real."""

    weights_TK: torch.Tensor
    indices_TK: torch.Tensor | None
    mask_T: torch.Tensor | None

    def indices(self, rows: slice) -> torch.Tensor:
        """The experts of some tokens, ``[t, K]``, 0 where there is none."""
        if self.indices_TK is not None:
            return self.indices_TK[rows].clamp_min(0)
        weights_tE = self.weights_TK[rows]
        return torch.arange(weights_tE.shape[1], device=weights_tE.device).expand_as(weights_tE)

    def sum(self, per_token: PerToken, outputs_tKO: torch.Tensor, rows: slice) -> torch.Tensor:
        """Of the loss over some real tokens."""
        chosen_tK = self.weights_TK[rows] > 0
        if self.indices_TK is not None:
            chosen_tK = chosen_tK & (self.indices_TK[rows] >= 0)
        values_t = per_token(outputs_tKO, chosen_tK)
        return (values_t if self.mask_T is None else values_t * self.mask_T[rows].to(values_t.dtype)).sum()
