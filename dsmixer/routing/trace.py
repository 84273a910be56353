"""Which experts each token heard at each router, in the order in which the tokens were read.

Shapes: M routers, T tokens, E experts.
"""

from __future__ import annotations

import torch

from dsmixer.routing.statistics import RouterOutput, RoutingStatistics


class TokenTrace(RoutingStatistics):
    """Keeps every token apart, on the CPU, where a step's statistics would add them up.

    Takes the place of the statistics in ``RoutingContext.recording`` around ``generate`` for one row: the
    first forward pass brings the tokens of the prompt, each further one a token that was written.
    """

    def __init__(self, num_routers: int, num_experts: int) -> None:
        super().__init__(num_routers, num_experts)
        self._weights: list[list[torch.Tensor]] = [[] for _ in range(num_routers)]
        self._entropies: list[list[torch.Tensor]] = [[] for _ in range(num_routers)]

    @torch.no_grad()
    def record(self, router: int, output: RouterOutput, domains_T: torch.Tensor | None) -> None:
        """Append one router's tokens."""
        choice = output.choice
        weights_TE = choice.gate_TE
        if weights_TE is None:
            nothing_TE = torch.zeros_like(output.p_TE)
            weights_TE = nothing_TE.scatter_add(1, choice.indices_TK, choice.weights_TK.to(nothing_TE.dtype))
        self._weights[router].append(weights_TE.detach().float().cpu())
        self._entropies[router].append(output.entropy_T().float().cpu())

    def weights_TE(self, router: int) -> torch.Tensor:
        """The weights that the experts spoke with, zeros included."""
        return _joined(self._weights[router])

    def entropy_T(self, router: int) -> torch.Tensor:
        """``H(p)`` of each token, nats."""
        return _joined(self._entropies[router])


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.zeros(0)
