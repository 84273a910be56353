"""What is promised of speed, and whether a run of the bench keeps it.

Training is promised from width 2048 on; what is found at smaller widths is said too, with that remark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tests.bench.case import Case
from tests.bench.systems.registry import OURS, SYSTEMS

if TYPE_CHECKING:
    from tests.bench.results import Row

PROMISED_WIDTH = 2048
THREE_TIMES = ("mola", "x_lora")
"""Peers that take at least three times as long at E = 64."""


@dataclass(frozen=True)
class Verdict:
    """One target on one case.

    Attributes:
        target: in words.
        case: where.
        limit: the ratio; ``at_most`` says on which side of it the promise is.
        measured: median ratio; None where it could not be measured.
        low: lower quartile.
        high: upper quartile.
        at_most: whether the ratio has to stay below the limit, and not above it.
        promised: whether the case is one that the promise is about.
        remark: why there is no figure.
    """

    target: str
    case: Case
    limit: float
    measured: float | None
    low: float | None = None
    high: float | None = None
    at_most: bool = True
    promised: bool = True
    remark: str = ""

    @property
    def met(self) -> bool | None:
        """By the median; a ratio that has to be large, by its lower quartile."""
        if self.measured is None:
            return None
        if self.at_most:
            return self.measured <= self.limit
        return (self.measured if self.low is None else self.low) >= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}

    def cells(self) -> tuple[str, ...]:
        sign = "at most" if self.at_most else "at least"
        limit = f"{sign} {self.limit:.2f}"
        if self.measured is None:
            return self.target, self.case.title(), limit, "", f"not measured: {self.remark}"
        value = f"{self.measured:.3f}"
        if self.low is not None:
            value += f" ({self.low:.3f} to {self.high:.3f})"
        word = "met" if self.met else "missed"
        return (
            self.target,
            self.case.title(),
            limit,
            value,
            word if self.promised else f"{word}; not promised",
        )


def check(rows: Sequence[Row]) -> list[Verdict]:
    """Every target on every case that it is about, in the order of the rows."""
    cases = list(dict.fromkeys(row.case for row in rows))
    found: list[Verdict] = []
    for case in cases:
        of_case = {row.system: row for row in rows if row.case == case}
        for rule in (_against_lora, _stage_one, _decoding, _against_peers):
            found += rule(case, of_case)
    return found


Rows = Mapping[str, "Row"]


def _against_lora(case: Case, rows: Rows) -> Iterator[Verdict]:
    limits = {(6, 64): 1.10, (196, 16): 1.15}
    limit = limits.get((case.experts, case.rank))
    if case.what == "train" and limit is not None and OURS in rows:
        yield _by_spread("stage two / PEFT LoRA", case, limit, rows[OURS], lambda row: row.to_lora)


def _stage_one(case: Case, rows: Rows) -> Iterator[Verdict]:
    if case.what == "train" and "stage_one" in rows:
        yield _by_spread("stage one / PEFT LoRA", case, 1.05, rows["stage_one"], lambda row: row.to_lora)


def _decoding(case: Case, rows: Rows) -> Iterator[Verdict]:
    if case.what == "decode" and OURS in rows:
        yield _by_spread("decoding / frozen base", case, 1.15, rows[OURS], lambda row: row.to_base)


def _by_spread(target: str, case: Case, limit: float, row: Row, of: Callable[[Row], Any]) -> Verdict:
    found = of(row)
    promised = case.what == "decode" or case.width >= PROMISED_WIDTH
    if found is None:
        return Verdict(target, case, limit, None, promised=promised, remark=row.problem or "no reference")
    return Verdict(target, case, limit, found.median, found.low, found.high, promised=promised)


def _against_peers(case: Case, rows: Rows) -> Iterator[Verdict]:
    """Each peer by ours, of the same rounds."""
    ours = rows.get(OURS)
    for name, row in rows.items():
        if not SYSTEMS[name].peer or ours is None:
            continue
        target = f"{row.title} / ours"
        three = case.experts == 64 and name in THREE_TIMES
        limit = 3.0 if three else 1.0
        found = row.to_ours
        if found is None:
            remark = row.problem or ours.problem or "ours was not measured beside it"
            yield Verdict(target, case, limit, None, at_most=False, remark=remark)
        else:
            yield Verdict(target, case, limit, found.median, found.low, found.high, at_most=False)
