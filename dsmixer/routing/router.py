"""The router of one projection, or of the projections of a block that read the same input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Router(nn.Module):
    """``logits = G x`` with ``G [E, D]`` and no bias.

    The product runs in the dtype of its input; the logits come out in float32 (float64 stays float64).

    Args:
        num_experts: E.
        in_features: D.
        device: where ``G`` lives; ``meta`` counts without allocating.
    """

    def __init__(self, num_experts: int, in_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, in_features, device=device))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        logits_TE = F.linear(x_TD, self.weight.to(x_TD.dtype))
        return logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
