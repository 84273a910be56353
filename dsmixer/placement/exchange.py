"""How a token reaches the experts it chose, and what they said reaches the token.

``LocalExchange``: every expert is on this rank (``replicate``), or is gathered here by ZeRO-3 (``weights``).
``TokenExchange``: a rank holds its experts and tokens travel (``tokens``): for each token and destination
rank one copy goes out and one partial sum comes back, dropless, by all-to-all. In stage one the sampler has
brought the tokens to their experts already, and nothing is sent.

An exchange keeps no state: ``dispatch`` returns the tokens with their metadata, ``combine`` takes them back.

Shapes: T tokens of this rank, D input width, O output width, K pairs a token, N copies sent by this rank,
M copies received, W ranks of the expert-parallel group, E experts, e experts held by this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dsmixer.experts.assignment import Assignment
from dsmixer.placement.layout import ExpertLayout, everything_here


@dataclass(frozen=True)
class Route:
    """Where the copies of a dispatch went: what ``combine`` needs.

    Attributes:
        tokens_N: token of each copy sent, in the order sent.
        by_token_N: the copies in the order of their tokens.
        starts_T: where the copies of each token start in that order.
        sent_W: copies sent to each rank of the group.
        received_W: copies received from each.
    """

    tokens_N: torch.Tensor
    by_token_N: torch.Tensor
    starts_T: torch.Tensor
    sent_W: list[int]
    received_W: list[int]


@dataclass(frozen=True)
class Dispatched:
    """Tokens at the rank that holds their experts.

    Attributes:
        x_MD: the tokens.
        assignment: over the experts of this rank.
        route: None where nothing travelled.
    """

    x_MD: torch.Tensor
    assignment: Assignment
    route: Route | None


class Exchange(Protocol):
    """What a mixer asks of the placement.

    Attributes:
        travels: whether tokens leave this rank.
    """

    @property
    def travels(self) -> bool: ...

    def dispatch(self, x_TD: torch.Tensor, assignment: Assignment) -> Dispatched:
        """Bring tokens to their experts."""

    def combine(self, y_MO: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Bring the experts' weighted sums back, ``[T, O]``."""


class LocalExchange:
    """All experts are here."""

    travels = False

    def dispatch(self, x_TD: torch.Tensor, assignment: Assignment) -> Dispatched:
        return Dispatched(x_TD, assignment, None)

    def combine(self, y_MO: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        return y_MO


@dataclass(frozen=True, eq=False)
class TokenExchange:
    """Tokens travel over an expert-parallel group.

    Attributes:
        group: the process group, W ranks.
        owner_E: rank in the group to which this one sends an expert's tokens, int64 on the device: itself
            where it holds the expert.
        local_E: index of each expert at that rank, int64 on the device.
        num_local: e, experts of this rank.
    """

    group: dist.ProcessGroup
    owner_E: torch.Tensor
    local_E: torch.Tensor
    num_local: int
    travels: bool = True

    def dispatch(self, x_TD: torch.Tensor, assignment: Assignment) -> Dispatched:
        """One synchronisation with the host, for the split sizes; every rank of the group must call it.

        Tokens whose experts are here stay, without any.
        """
        if assignment.here:
            return Dispatched(x_TD, assignment, None)
        indices_TK, weights_TK = _pairs(assignment)
        owners_TK = torch.where(indices_TK >= 0, self.owner_E[indices_TK.clamp_min(0)], -1)
        route, ranks_N = self._route(owners_TK)
        here_NK = owners_TK[route.tokens_N] == ranks_N[:, None]
        weights_NK = weights_TK[route.tokens_N] * here_NK
        local_NK = torch.where(here_NK, self.local_E[indices_TK[route.tokens_N].clamp_min(0)], -1)
        # weights and indices in one message: float32 holds any index below 2^24
        pairs_N2K = torch.cat((weights_NK.float(), local_NK.float()), dim=1)
        pairs_M2K = self._send(pairs_N2K, route)
        weights_MK, local_MK = pairs_M2K.chunk(2, dim=1)
        received = Assignment(
            self.num_local,
            indices_TK=local_MK.detach().long(),
            weights_TK=weights_MK.to(weights_TK.dtype),
        )
        return Dispatched(self._send(_Copy.apply(x_TD, route), route), received, route)

    def combine(self, y_MO: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        route = dispatched.route
        if route is None:
            return y_MO
        y_NO = _AllToAll.apply(y_MO, self.group, route.received_W, route.sent_W)
        y_TO: torch.Tensor = _SumCopies.apply(y_NO, route)
        return y_TO

    def _send(self, rows_NX: torch.Tensor, route: Route) -> torch.Tensor:
        rows_MX: torch.Tensor = _AllToAll.apply(rows_NX, self.group, route.sent_W, route.received_W)
        return rows_MX

    def _route(self, owners_TK: torch.Tensor) -> tuple[Route, torch.Tensor]:
        """The copies to send, by destination rank and then by token, and the rank of each."""
        num_tokens, world = owners_TK.shape[0], dist.get_world_size(self.group)
        # column W collects pairs of no expert
        goes_TW = torch.zeros(num_tokens, world + 1, dtype=torch.bool, device=owners_TK.device)
        goes_TW.scatter_(1, owners_TK % (world + 1), True)
        goes_WT = goes_TW[:, :world].T
        sent_W = goes_WT.sum(1)
        received_W = torch.empty_like(sent_W)
        dist.all_to_all_single(received_W, sent_W, group=self.group)
        sizes_2W = torch.stack((sent_W, received_W)).tolist()
        num_copies = sum(sizes_2W[0])
        order = torch.argsort(goes_WT.flatten().logical_not().to(torch.int8), stable=True)[:num_copies]
        tokens_N, ranks_N = order % max(1, num_tokens), order // max(1, num_tokens)
        sorted_N, by_token_N = torch.sort(tokens_N, stable=True)
        starts_T = torch.searchsorted(sorted_N, torch.arange(num_tokens, device=sorted_N.device))
        return Route(tokens_N, by_token_N, starts_T, *sizes_2W), ranks_N


def _pairs(assignment: Assignment) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs with -1 where there is none, which then travel nowhere."""
    if assignment.indices_TK is not None:
        assert assignment.weights_TK is not None
        return assignment.indices_TK, assignment.weights_TK
    return assignment.as_pairs()


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the experts are, and how tokens reach them.

    Attributes:
        layout: the experts of each rank.
        exchange: between them.
    """

    layout: ExpertLayout
    exchange: Exchange


def local_placement(num_experts: int) -> Placement:
    """Every expert on this rank."""
    return Placement(everything_here(num_experts), LocalExchange())


def token_placement(layout: ExpertLayout, group: dist.ProcessGroup, device: torch.device | str) -> Placement:
    """Experts over the ranks of ``group``, tokens travel."""
    owner, place = layout.destination_and_place()
    exchange = TokenExchange(
        group,
        torch.tensor(owner, device=device),
        torch.tensor(place, device=device),
        len(layout.local),
    )
    return Placement(layout, exchange)


class _Copy(torch.autograd.Function):
    """Tokens to their copies; the gradient of a token is the sum of its copies'."""

    @staticmethod
    def forward(ctx: Any, x_TX: torch.Tensor, route: Route) -> torch.Tensor:
        ctx.route = route
        return x_TX.index_select(0, route.tokens_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum_copies(grads[0], ctx.route), None


class _SumCopies(torch.autograd.Function):
    """The sum of each token's copies; each copy's gradient is its token's."""

    @staticmethod
    def forward(ctx: Any, y_NX: torch.Tensor, route: Route) -> torch.Tensor:
        ctx.route = route
        return _sum_copies(y_NX, route)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].index_select(0, ctx.route.tokens_N), None


def _sum_copies(rows_NX: torch.Tensor, route: Route) -> torch.Tensor:
    """Add up the copies of each token in the order of the ranks that they went to: the same on every run."""
    if not len(rows_NX):
        return rows_NX.new_zeros(len(route.starts_T), rows_NX.shape[1])
    return F.embedding_bag(route.by_token_N, rows_NX.contiguous(), route.starts_T, mode="sum")


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group by split sizes; the gradient travels the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]
    ) -> torch.Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _all_to_all(rows, group, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.group, ctx.received, ctx.sent), None, None, None


def _all_to_all(
    rows: torch.Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]
) -> torch.Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
