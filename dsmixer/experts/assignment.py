"""Which experts a token hears, and how loud: what every compute form takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Assignment:
    """The weight each token gives to experts, as pairs or as a full gate.

    Exactly one of the two forms is set:

    - ``indices_TK`` (int64, ``-1`` for no expert) with ``weights_TK``: K experts a token;
    - ``gate_TE``: one weight for each expert, zeros included.

    Attributes:
        num_experts: E.
    """

    num_experts: int
    indices_TK: torch.Tensor | None = None
    weights_TK: torch.Tensor | None = None
    gate_TE: torch.Tensor | None = None

    def __post_init__(self) -> None:
        pairs = self.indices_TK is not None and self.weights_TK is not None
        assert pairs != (self.gate_TE is not None), "an assignment is either pairs or a gate"

    def as_gate(self) -> torch.Tensor:
        """The full gate ``[T, E]``; pairs with index -1 weigh nothing."""
        if self.gate_TE is not None:
            return self.gate_TE
        assert self.indices_TK is not None and self.weights_TK is not None
        present_TK = self.indices_TK >= 0
        weights_TK = self.weights_TK * present_TK
        gate_TE = weights_TK.new_zeros(self.indices_TK.shape[0], self.num_experts)
        return gate_TE.scatter_add(1, self.indices_TK.clamp_min(0), weights_TK)

    def as_pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices ``[T, K]`` in 0..E-1 and weights ``[T, K]``; absent pairs become expert 0 with weight 0."""
        if self.gate_TE is not None:
            experts_E = torch.arange(self.num_experts, device=self.gate_TE.device)
            return experts_E.expand_as(self.gate_TE), self.gate_TE
        assert self.indices_TK is not None and self.weights_TK is not None
        return self.indices_TK.clamp_min(0), self.weights_TK * (self.indices_TK >= 0)
