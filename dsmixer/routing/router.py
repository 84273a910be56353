"""The router of one projection, or of the projections of a block that read the same input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Router(nn.Module):
    """``logits = G x`` with ``G [E, D]`` and no bias.

    The product runs in the dtype of its input; the logits come out in float32 (float64 stays float64).
    Kept for the backward pass is the input, which the mixer keeps anyway.

    Args:
        num_experts: E.
        in_features: D.
        device: where ``G`` lives; ``meta`` counts without allocating.
    """

    def __init__(self, num_experts: int, in_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, in_features, device=device))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return logits_of(x_TD, self.weight)
        logits_TE: torch.Tensor = _Logits.apply(x_TD, self.weight)
        return logits_TE


def logits_of(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """``G x``, ``[T, E]``, as ``Router`` has it."""
    logits_TE = F.linear(x_TD, weight_ED.to(x_TD.dtype))
    return logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()


class _Logits(torch.autograd.Function):
    """Keeps the input and the weight themselves, and no cast of the weight to the input's dtype."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return logits_of(x_TD, weight_ED)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        g_TE = grads[0].to(x_TD.dtype)
        need_x, need_weight = ctx.needs_input_grad
        x_grad = g_TE @ weight_ED.to(x_TD.dtype) if need_x else None
        return x_grad, (g_TE.T @ x_TD).to(weight_ED.dtype) if need_weight else None
