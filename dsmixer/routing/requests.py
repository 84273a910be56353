"""Requests of several kinds in one batch: each row goes to one expert, to none, or by the routers.

Shapes: N requests, T tokens (those of one row are neighbours), K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from functools import lru_cache
from typing import Final, Literal, TypeAlias

import torch

from dsmixer.config.errors import UserError
from dsmixer.experts.assignment import Assignment
from dsmixer.routing.modes import NO_EXPERT, ROUTERS, Choice, Routing


class _Sentinel(Enum):
    BY_ROUTERS = "by the routers"

    def __repr__(self) -> str:
        return self.name


BY_ROUTERS: Final = _Sentinel.BY_ROUTERS
"""A request whose tokens go where the routers send them."""

Request: TypeAlias = str | Literal[_Sentinel.BY_ROUTERS] | None
"""An expert's name, None for the base alone, or ``BY_ROUTERS``."""


def routing_of(request: Request, names: Sequence[str], by_routers: Routing) -> Routing:
    """One way for all tokens.

    Args:
        request: what is asked for.
        names: the experts, in order.
        by_routers: what ``BY_ROUTERS`` means.

    Raises:
        UserError: no expert has that name.
    """
    place = _place(request, names, where=None)
    if place == ROUTERS:
        return by_routers
    return Routing(mode="none") if place == NO_EXPERT else Routing(mode="hard", expert=place)


def routing_by_row(requests: Sequence[Request], names: Sequence[str], by_routers: Routing) -> Routing:
    """A way for each row of a batch, ``requests`` in the order of the rows.

    Raises:
        UserError: there is no request, or one names no expert.
    """
    if not requests:
        raise UserError("a batch of no requests", where="route_to", fix="give one entry for each row")
    places = [_place(request, names, where=f"row {i}") for i, request in enumerate(requests)]
    return replace(by_routers, rows=tuple(places))


def _place(request: object, names: Sequence[str], where: str | None) -> int:
    if request is None:
        return NO_EXPERT
    if request is BY_ROUTERS:
        return ROUTERS
    if isinstance(request, str) and request in names:
        return names.index(request)
    raise UserError(f"no expert is called {request!r}", where=where, fix=f"choose from {', '.join(names)}")


def check_rows(rows: tuple[int, ...], num_rows: int) -> None:
    """Whether a batch has as many rows as requests, or a whole multiple: beams and returned sequences stand
    in the rows after each other, those of one request together.

    Raises:
        UserError: it has not.
    """
    if num_rows % len(rows):
        problem = f"{len(rows)} requests for a batch of {num_rows} rows"
        fix = "give route_to one entry for each row (rows are requests times beams or returned sequences)"
        raise UserError(problem, where="route_to", fix=fix)


def forced_assignment(
    rows: tuple[int, ...], num_tokens: int, num_experts: int, device: torch.device
) -> Assignment:
    """The pairs of a batch in which no row asks the routers."""
    forced_T1 = _forced(rows, num_tokens, device)
    return Assignment(num_experts, indices_TK=forced_T1, weights_TK=(forced_T1 >= 0).float())


def with_forced_rows(choice: Choice, rows: tuple[int, ...]) -> Choice:
    """What the routers chose, and in rows that do not ask them, the expert of the row alone or none."""
    indices_TK, weights_TK, gate_TE = choice.indices_TK, choice.weights_TK, choice.gate_TE
    forced_T1 = _forced(rows, indices_TK.shape[0], indices_TK.device)
    routed_T1 = forced_T1 == ROUTERS
    if gate_TE is not None:
        experts_E = torch.arange(gate_TE.shape[1], device=gate_TE.device)
        gate_TE = torch.where(routed_T1, gate_TE, (experts_E == forced_T1).to(gate_TE.dtype))
    # the expert of a row comes first, with weight 1, and the other places are empty
    first_K = torch.arange(indices_TK.shape[1], device=indices_TK.device) == 0
    forced_TK = torch.where(first_K, forced_T1, NO_EXPERT)
    indices_TK = torch.where(routed_T1, indices_TK, forced_TK)
    weights_TK = torch.where(routed_T1, weights_TK, (forced_TK >= 0).to(weights_TK.dtype))
    return Choice(indices_TK, weights_TK, gate_TE)


def _forced(rows: tuple[int, ...], num_tokens: int, device: torch.device) -> torch.Tensor:
    """The entry of each token's row, ``[T, 1]``."""
    assert num_tokens % len(rows) == 0, (num_tokens, len(rows))
    return _on(rows, device).repeat_interleave(num_tokens // len(rows))[:, None]


@lru_cache(maxsize=64)
def _on(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # a tensor made in inference mode could not be used outside of it
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)
