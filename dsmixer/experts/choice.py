"""Which compute form a bank takes. The constants are measured, by ``python -m tests.bench.forms``.

A product over tokens of width D costs in proportion to the rank that it makes of them. In units of that:
the wide product of C experts costs ``C R``; by pairs a token costs ``K (rank * R + row) + call / (T D)``,
where ``rank`` says how much slower a product of few rows is, ``row`` what it costs to bring a row to its
expert and back, and ``call`` what the smaller operations around it cost.

Shapes: T tokens, D input width, E experts, C chosen experts, R LoRA rank, K experts a token, N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.blocked import blocked_pairs
from dsmixer.experts.chosen import CHOSEN_SHARE
from dsmixer.experts.dropout import Dropout
from dsmixer.experts.grouped import sorted_pairs
from dsmixer.experts.host import can_multiply, host_pairs
from dsmixer.experts.pairs import Pairs, Sorted, by_pairs

HIGHEST = 1e300
"""Bound of a cost in a table; products with numbers of tokens stay finite."""


@dataclass(frozen=True)
class Costs:
    """Of a kind of processor and a dtype, as the module says.

    Attributes:
        rank, row, call: of pairs.
        always: rank up to which the wide product is taken in any case.
        filled: share of the rows of blocks that have a pair, from which on blocks are taken.
        short: mean pairs of an expert times R, below which blocks are taken though they are not filled.
        fused: mean pairs of an expert times R, up to which pairs are multiplied where they lie, if there are
            kernels for that.
    """

    rank: float
    row: float
    call: float
    always: float
    filled: float
    short: float
    fused: float = 0.0


@dataclass(frozen=True)
class FormTable:
    """What decides between the forms; the same table and the same tokens give the same form, as long as the
    kernels that it wants can be had.

    Attributes:
        costs: by ``"cpu float32"``, kind of device and dtype; a device alone stands for its other dtypes.
    """

    costs: Mapping[str, Costs]

    def of(self, x_TD: torch.Tensor) -> Costs:
        """For the processor and the dtype of the tokens."""
        device, dtype = x_TD.device.type, str(x_TD.dtype).removeprefix("torch.")
        found = self.costs.get(f"{device} {dtype}") or self.costs.get(device)
        return found or MEASURED.costs.get(device) or MEASURED.costs["cuda"]

    @property
    def wants_kernels(self) -> bool:
        """Whether it takes the kernels for the CPU anywhere."""
        return any(costs.fused > 0 for costs in self.costs.values())

    def without_kernels(self) -> FormTable:
        """The same for a machine on which they can't be had."""
        return FormTable({name: replace(costs, fused=0.0) for name, costs in self.costs.items()})

    def to_json(self) -> dict[str, dict[str, float]]:
        return {name: asdict(costs) for name, costs in self.costs.items()}

    @classmethod
    def from_json(cls, value: Any) -> FormTable:
        """What ``to_json`` gave.

        Raises:
            ValueError: it is something else.
        """
        names = {field.name for field in fields(Costs)}
        needed = {field.name for field in fields(Costs) if field.default is MISSING}
        if not isinstance(value, dict) or not all(isinstance(of, dict) for of in value.values()):
            raise ValueError("it is no table of devices")
        for name, of in value.items():
            if not needed <= of.keys() <= names or not all(map(_is_cost, of.values())):
                raise ValueError(f"{name!r} wants a number for each of {', '.join(sorted(needed))}")
        return cls({name: Costs(**of) for name, of in value.items()})


def _is_cost(value: Any) -> bool:
    """A number that arithmetic can do with: no bool, not infinite, no NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < HIGHEST


MEASURED = FormTable(
    {
        "cpu": Costs(rank=1.2, row=30, call=4e6, always=0, filled=0.75, short=64, fused=4096),
        "cpu bfloat16": Costs(rank=1.3, row=120, call=4e7, always=0, filled=0.5, short=1500, fused=800),
        "cuda": Costs(rank=0, row=0, call=0, always=512, filled=1, short=0),
    }
)
"""As ``tests.bench.forms`` found them on two cores of two makers; the line of CUDA is not measured."""


def is_wide(costs: Costs, x_TD: torch.Tensor, num_experts: int, rank: int, top_k: int) -> bool:
    """Whether one wide product of so many experts costs no more than products by pairs."""
    by_pairs = top_k * (costs.rank * rank + costs.row) + costs.call / max(1, x_TD.numel())
    return num_experts * rank <= max(costs.always, by_pairs)


def choose_form(x_TD: torch.Tensor, rank: int, assignment: Assignment, table: FormTable = MEASURED) -> str:
    """``dense`` or ``pairs``."""
    indices_TK, num_experts = assignment.indices_TK, assignment.num_experts
    if indices_TK is None:
        return "dense"  # every expert speaks: by pairs, all tokens would be copied for each of them
    chosen_C = assignment.chosen_C
    if chosen_C is not None and len(chosen_C) <= CHOSEN_SHARE * num_experts:
        num_experts = len(chosen_C)
    return "dense" if is_wide(table.of(x_TD), x_TD, num_experts, rank, indices_TK.shape[1]) else "pairs"


def pairs_form(
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    assignment: Assignment,
    dropout: Dropout | None = None,
    table: FormTable = MEASURED,
) -> torch.Tensor:
    """By pairs, in the layout that suits how the experts are loaded."""
    on_host = x_TD.device.type == "cpu" and can_multiply(x_TD.dtype, a_ERD.dtype, b_ERO.dtype)
    layout = partial(suited_pairs, rank=a_ERD.shape[1], costs=table.of(x_TD), on_host=on_host)
    return by_pairs(x_TD, a_ERD, b_ERO, s_E, assignment, dropout, layout=layout)


def suited_pairs(ordered: Sorted, rank: int, costs: Costs, *, on_host: bool) -> Pairs:
    """Where they lie, if experts have few rows each and there are kernels ``on_host``; else in blocks, where
    those suit; else one after the other."""
    if on_host and ordered.seen and 0 < _mean_rows(ordered) * rank <= costs.fused:
        return host_pairs(ordered)
    return blocked_pairs(ordered) if suits_blocks(ordered, rank, costs) else sorted_pairs(ordered)


def _mean_rows(ordered: Sorted) -> float:
    """Of an expert that has any."""
    return int(ordered.counts_E.sum()) / max(1, int((ordered.counts_E > 0).sum()))


def suits_blocks(ordered: Sorted, rank: int, costs: Costs) -> bool:
    """Whether blocks are filled well, or so short that all their products cost little."""
    if not ordered.seen:
        return False
    counts_E = ordered.counts_E
    present, named = int(counts_E.sum()), int((counts_E > 0).sum())
    return present >= costs.filled * int(counts_E.max()) * named or present * rank < costs.short * named
