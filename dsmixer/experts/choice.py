"""Which compute form a bank takes. The constants are measured, by ``python -m tests.bench.forms``.

A product over tokens of width D costs in proportion to the rank that it makes of them. In units of that:
the wide product of C experts costs ``C R``; by pairs a token costs ``K (rank * R + row) + call / (T D)``,
where ``rank`` says how much slower a product of few rows is, ``row`` what it costs to bring a row to its
expert and back, and ``call`` what the smaller operations around it cost.

Shapes: T tokens, D input width, E experts, C chosen experts, R LoRA rank, K experts a token, N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.blocked import blocked_pairs
from dsmixer.experts.chosen import CHOSEN_SHARE
from dsmixer.experts.dropout import Dropout
from dsmixer.experts.grouped import sorted_pairs
from dsmixer.experts.pairs import Pairs, Sorted, by_pairs, sort_pairs


@dataclass(frozen=True)
class Costs:
    """Of a kind of processor and a dtype, as the module says.

    Attributes:
        rank, row, call: of pairs.
        always: rank up to which the wide product is taken in any case.
        filled: share of the rows of blocks that have a pair, from which on blocks are taken.
        short: mean pairs of an expert times R, below which blocks are taken though they are not filled.
    """

    rank: float
    row: float
    call: float
    always: int
    filled: float
    short: float


ON_CPU = {
    torch.float32: Costs(rank=1.3, row=45, call=2e7, always=0, filled=0.75, short=64),
    torch.bfloat16: Costs(rank=1.3, row=120, call=6e7, always=0, filled=0.5, short=1500),
}
ON_DEVICE = Costs(rank=0, row=0, call=0, always=512, filled=1, short=0)


def costs_of(x_TD: torch.Tensor) -> Costs:
    """Of the processor and the dtype of the tokens."""
    if x_TD.device.type != "cpu":
        return ON_DEVICE
    return ON_CPU.get(x_TD.dtype, ON_CPU[torch.float32])


def is_wide(x_TD: torch.Tensor, num_experts: int, rank: int, top_k: int) -> bool:
    """Whether one wide product of so many experts costs no more than products by pairs."""
    costs = costs_of(x_TD)
    by_pairs = top_k * (costs.rank * rank + costs.row) + costs.call / max(1, x_TD.numel())
    return num_experts * rank <= max(costs.always, by_pairs)


def choose_form(x_TD: torch.Tensor, rank: int, assignment: Assignment) -> str:
    """``dense`` or ``pairs``."""
    indices_TK, num_experts = assignment.indices_TK, assignment.num_experts
    if indices_TK is None:
        return "dense"  # every expert speaks: by pairs, all tokens would be copied for each of them
    chosen_C = assignment.chosen_C
    if chosen_C is not None and len(chosen_C) <= CHOSEN_SHARE * num_experts:
        num_experts = len(chosen_C)
    return "dense" if is_wide(x_TD, num_experts, rank, indices_TK.shape[1]) else "pairs"


def pairs_form(
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    assignment: Assignment,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """By pairs, in the layout that suits how the experts are loaded."""
    rank, costs = a_ERD.shape[1], costs_of(x_TD)
    layout = partial(_layout, num_experts=assignment.num_experts, rank=rank, costs=costs)
    return by_pairs(x_TD, a_ERD, b_ERO, s_E, assignment.pairs, layout, dropout)


def _layout(indices_TK: torch.Tensor, num_experts: int, rank: int, costs: Costs) -> Pairs:
    ordered = sort_pairs(indices_TK, num_experts)
    return blocked_pairs(ordered) if suits_blocks(ordered, rank, costs) else sorted_pairs(ordered)


def suits_blocks(ordered: Sorted, rank: int, costs: Costs) -> bool:
    """Whether blocks are filled well, or so short that all their products cost little."""
    if not ordered.seen:
        return False
    counts_E = ordered.counts_E
    present, named = int(counts_E.sum()), int((counts_E > 0).sum())
    return present >= costs.filled * int(counts_E.max()) * named or present * rank < costs.short * named
