"""The ways from a router's probabilities to the experts a token hears.

Each mode is a function ``(p_TE, Routing) -> Choice``. Adding one is one function and one line in ``modes``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

NO_EXPERT, ROUTERS = -1, -2
"""In ``Routing.rows``: no expert, and those that the routers choose."""


@dataclass(frozen=True)
class Routing:
    """How tokens find their experts.

    Attributes:
        mode: ``soft``, ``topk``, ``hard_soft``, ``top_p`` through the router; ``hard`` by expert ids that
            the batch carries, or by the one ``expert`` for every token; ``uniform``, every expert with
            weight 1/E; ``none``, the base model alone.
        top_k: K, experts a token in ``topk`` and ``hard_soft``.
        renormalize: whether the chosen weights are divided by their sum.
        top_p: the probability mass that ``top_p`` has to reach.
        expert: index of the one expert, in ``hard``.
        rows: the expert of each row of the batch; ``NO_EXPERT`` for the base alone, ``ROUTERS`` for a row
            that goes the way of ``mode``. None: all rows do.
    """

    mode: str = "topk"
    top_k: int = 3
    renormalize: bool = True
    top_p: float = 0.9
    expert: int | None = None
    rows: tuple[int, ...] | None = None

    @property
    def uses_router(self) -> bool:
        return self.mode in modes and (self.rows is None or ROUTERS in self.rows)

    @property
    def renormalized_topk(self) -> bool:
        """Whether the weights are those of ``topk``, with sum 1."""
        return self.mode == "topk" and self.renormalize


@dataclass(frozen=True)
class Choice:
    """What a mode decided for T tokens.

    Attributes:
        gate_TE: weights of all experts, where the sum runs over all of them; else None.
        indices_TK: the chosen experts, ``[T, K]``; for ``soft`` the largest ones, for statistics only.
        weights_TK: their weights, renormalised where the mode does so.
    """

    indices_TK: torch.Tensor
    weights_TK: torch.Tensor
    gate_TE: torch.Tensor | None = None

    @property
    def shares_TK(self) -> torch.Tensor:
        """The chosen weights with sum 1 for each token, also where the mode does not renormalise."""
        return self.weights_TK / self.weights_TK.sum(1, keepdim=True)


def _top(p_TE: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    weights_TK, indices_TK = p_TE.topk(min(routing.top_k, p_TE.shape[1]), dim=1)
    if routing.renormalize:
        weights_TK = renormalized(weights_TK)
    return indices_TK, weights_TK


def renormalized(weights_TK: torch.Tensor) -> torch.Tensor:
    """With sum 1 for each token; kept are the result, which a form keeps too, and one number a token."""
    divided_TK: torch.Tensor = _Renormalized.apply(weights_TK)
    return divided_TK


class _Renormalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TK: torch.Tensor) -> torch.Tensor:
        sum_T1 = weights_TK.sum(1, keepdim=True)
        divided_TK = weights_TK / sum_T1
        ctx.save_for_backward(divided_TK, sum_T1)
        return divided_TK

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        divided_TK, sum_T1 = ctx.saved_tensors
        (g_TK,) = grads
        return (g_TK - (g_TK * divided_TK).sum(1, keepdim=True)) / sum_T1


def topk(p_TE: torch.Tensor, routing: Routing) -> Choice:
    """The K largest, renormalised to sum 1 unless told otherwise."""
    indices_TK, weights_TK = _top(p_TE, routing)
    return Choice(indices_TK, weights_TK)


def topk_of_logits(logits_TE: torch.Tensor, routing: Routing) -> Choice:
    """What renormalised ``topk`` makes of ``softmax(logits)``, without the probabilities of the others."""
    logits_TK, indices_TK = logits_TE.topk(min(routing.top_k, logits_TE.shape[1]), dim=1)
    return Choice(indices_TK, logits_TK.softmax(1))


def soft(p_TE: torch.Tensor, routing: Routing) -> Choice:
    """Every expert with weight p."""
    indices_TK, weights_TK = _top(p_TE.detach(), routing)
    return Choice(indices_TK, weights_TK, gate_TE=p_TE)


def hard_soft(p_TE: torch.Tensor, routing: Routing) -> Choice:
    """Forward as ``topk``, gradient as ``soft``: ``w = stop(w_topk - p) + p``."""
    indices_TK, weights_TK = _top(p_TE.detach(), routing)
    top_TE = torch.zeros_like(p_TE).scatter(1, indices_TK, weights_TK)
    return Choice(indices_TK, weights_TK, gate_TE=top_TE - p_TE.detach() + p_TE)


def top_p(p_TE: torch.Tensor, routing: Routing) -> Choice:
    """The fewest largest experts whose probabilities together reach ``top_p``."""
    with torch.no_grad():
        sorted_TE, order_TE = p_TE.sort(dim=1, descending=True)
        before_TE = F.pad(sorted_TE.cumsum(1)[:, :-1], (1, 0))
        reached_TE = torch.zeros_like(p_TE, dtype=torch.bool).scatter(1, order_TE, before_TE < routing.top_p)
    gate_TE = p_TE * reached_TE
    if routing.renormalize:
        gate_TE = renormalized(gate_TE)
    return Choice(order_TE, gate_TE.detach().gather(1, order_TE), gate_TE=gate_TE)


modes: dict[str, Callable[[torch.Tensor, Routing], Choice]] = {
    "soft": soft,
    "topk": topk,
    "hard_soft": hard_soft,
    "top_p": top_p,
}
