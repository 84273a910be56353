"""Which experts a token hears, and how loud: what every compute form takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Assignment:
    """The weight each token gives to experts, as pairs or as a full gate.

    Exactly one of the two forms is set:

    - ``indices_TK`` (int64, ``-1`` for no expert) with ``weights_TK``: K experts a token;
    - ``gate_TE``: one weight for each expert, zeros included.

    Attributes:
        num_experts: E.
        here: whether the indices are places in the banks of the token's own rank, so that none travels; E is
            then the number of experts there.
    """

    num_experts: int
    indices_TK: torch.Tensor | None = None
    weights_TK: torch.Tensor | None = None
    gate_TE: torch.Tensor | None = None
    here: bool = False

    def __post_init__(self) -> None:
        pairs = self.indices_TK is not None and self.weights_TK is not None
        assert pairs != (self.gate_TE is not None), "an assignment is either pairs or a gate"

    @cached_property
    def chosen_C(self) -> torch.Tensor | None:
        """The experts that some pair names, ascending, int64.

        None for a gate, and where to count them would be to wait for a device.
        """
        if self.indices_TK is None or self.indices_TK.device.type != "cpu":
            return None
        named_E = torch.zeros(self.num_experts + 1, dtype=torch.bool)
        named_E.scatter_(0, self.indices_TK.flatten() + 1, True)  # -1 comes first
        return named_E[1:].nonzero().flatten()

    def as_gate(self) -> torch.Tensor:
        """The full gate ``[T, E]``; pairs with index -1 weigh nothing."""
        if self.gate_TE is not None:
            return self.gate_TE
        assert self.indices_TK is not None and self.weights_TK is not None
        present_TK = self.indices_TK >= 0
        weights_TK = self.weights_TK * present_TK
        gate_TE = weights_TK.new_zeros(self.indices_TK.shape[0], self.num_experts)
        return gate_TE.scatter_add(1, self.indices_TK.clamp_min(0), weights_TK)

    def as_gate_over(self, chosen_C: torch.Tensor) -> torch.Tensor:
        """The gate of the experts that are chosen at all, ``[T, C]``."""
        assert self.indices_TK is not None and self.weights_TK is not None
        weights_TK = self.weights_TK * (self.indices_TK >= 0)
        slots_TK = torch.searchsorted(chosen_C, self.indices_TK)  # 0 where there is no expert
        gate_TC = weights_TK.new_zeros(len(self.indices_TK), max(1, len(chosen_C)))
        return gate_TC.scatter_add(1, slots_TK, weights_TK)[:, : len(chosen_C)]

    @property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices ``[T, K]``, -1 for no expert, and weights; of a gate all of them."""
        if self.indices_TK is None or self.weights_TK is None:
            return self.as_pairs()
        return self.indices_TK, self.weights_TK

    def as_pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices ``[T, K]`` in 0..E-1 and weights ``[T, K]``; absent pairs become expert 0 with weight 0."""
        if self.gate_TE is not None:
            experts_E = torch.arange(self.num_experts, device=self.gate_TE.device)
            return experts_E.expand_as(self.gate_TE), self.gate_TE
        assert self.indices_TK is not None and self.weights_TK is not None
        return self.indices_TK.clamp_min(0), self.weights_TK * (self.indices_TK >= 0)
