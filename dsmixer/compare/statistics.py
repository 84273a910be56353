"""From rows of single seeds to the rows of a table: means and how far the seeds spread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal

from dsmixer.compare.gather import BASE, MAJORITY, MIXTURE, OWN, STAGE_ONE, Gathered, Row
from dsmixer.compare.plan import Plan, Trunk

Spread = Literal["standard deviation", "range"]
RowKind = Literal["reference", "told", "method", "variant"]
Values = dict[tuple[str, str], dict[int, float]]
MEAN = "mean of domains"
"""The column of the mean over domains; no domain is called so."""


@dataclass(frozen=True)
class Figure:
    """One cell of the table.

    Attributes:
        mean: over seeds.
        spread: sample standard deviation (n - 1), or the range of two seeds; None of one.
        values: by seed.
    """

    mean: float
    spread: float | None
    values: Mapping[int, float]

    @property
    def spread_is(self) -> Spread | None:
        return None if self.spread is None else "range" if len(self.values) == 2 else "standard deviation"


def figure_of(values: Mapping[int, float]) -> Figure:
    """Mean and spread of the values of at least one seed."""
    numbers = list(values.values())
    if len(numbers) == 2:
        spread: float | None = abs(numbers[0] - numbers[1])
    else:
        spread = stdev(numbers) if len(numbers) > 2 else None
    return Figure(fmean(numbers), spread, dict(values))


def recovered(base: float, method: float, own: float) -> float | None:
    """Share of the own expert's gain in loss that a method recovers; None where there is no gain."""
    return (base - method) / (base - own) if base > own else None


@dataclass
class TableRow:
    """One row of the table.

    Attributes:
        label: as it is shown.
        kind: a reference (base, majority, own expert), another method, a variant, or one of the last two that
            is told the domain of what it answers, which no mixture is.
        variant: its label, of a variant's row.
        trunk: digest of the experts it is on.
        method: as the rows of the cells name it, or ``own``.
        name: of the variant without the axes.
        point: name and value of each axis, of a variant.
        values: by metric and domain, by seed; ``MEAN`` among the domains is the mean over them.
        measures: by name, by seed.
    """

    label: str
    kind: RowKind
    variant: str | None
    trunk: str
    method: str
    name: str | None = None
    point: tuple[tuple[str, Any], ...] = ()
    values: Values = field(default_factory=dict)
    measures: dict[str, dict[int, float]] = field(default_factory=dict)


def table_rows(plan: Plan, gathered: Gathered) -> list[TableRow]:
    """All rows that have a figure: references and methods of each trunk, then the variants in order."""
    found = []
    for trunk in plan.trunks:
        found += _of_trunk(plan, trunk, gathered)
    for variant in plan.variants:
        trunk = next(trunk for trunk in plan.trunks if variant.label in trunk.variants)
        rows = [row for row in gathered.rows if row["variant"] == variant.label]
        for method, suffix in _methods_of_variant(plan, variant.label, rows):
            kind: RowKind = "told" if method.startswith(OWN) else "variant"
            row = TableRow(
                variant.label + suffix, kind, variant.label, trunk.digest, method, variant.name + suffix
            )
            row.point = variant.point
            _fill(row, rows, gathered)
            found.append(row)
    return [row for row in found if row.values or row.measures]


def _of_trunk(plan: Plan, trunk: Trunk, gathered: Gathered) -> list[TableRow]:
    """Majority, base, own expert and the other methods on one trunk."""
    rows = [row for row in gathered.rows if row["trunk"] == trunk.digest]
    other = [row for row in rows if row["cell"] == "method"]
    first = trunk.variants[0]
    runs = [
        row for row in rows if row["cell"] == "experts" or (not trunk.trained and row["variant"] == first)
    ]
    methods = list(dict.fromkeys(row["method"] for row in other))
    suffix = f" ({_told(trunk)})" if len(plan.trunks) > 1 else ""
    kept = any(row["method"].endswith(STAGE_ONE) for row in runs)  # the experts as stage two found them
    references = (MAJORITY, BASE, OWN + STAGE_ONE if kept else OWN)
    found = []
    for method in references:
        row = TableRow(_title(method) + suffix, "reference", None, trunk.digest, method)
        _fill(row, [*runs, *other], gathered)
        found.append(row)
    for method in methods:
        if method not in references:
            told = (trunk.digest, method) in gathered.told
            label = f"{method}, told the domain" if told else method
            row = TableRow(label + suffix, "told" if told else "method", None, trunk.digest, method)
            _fill(row, other, gathered)
            found.append(row)
    return found


def _told(trunk: Trunk) -> str:
    more = len(trunk.variants) - 2
    return "; ".join(trunk.variants[:2]) + (f"; {more} more" if more > 0 else "")


def _title(method: str) -> str:
    return {MAJORITY: "majority class"}.get(method, "own expert" if method.startswith(OWN) else method)


def _methods_of_variant(plan: Plan, label: str, rows: Sequence[Row]) -> Iterable[tuple[str, str]]:
    """The mixture, and what else the file has asked to be scored in the variants' own runs."""
    yield MIXTURE, ""
    whole = next(whole for whole in plan.whole if whole.variant.label == label)
    if not whole.loaded.said("evaluation.methods"):
        return
    there = {row["method"] for row in rows}
    if "uniform" in there:
        yield "uniform", ": uniform"
    experts = [name for name in there if name.startswith("expert:")]
    if any(not name.endswith(STAGE_ONE) for name in experts):
        yield OWN, ": own expert"
    if any(name.endswith(STAGE_ONE) for name in experts):
        yield f"{OWN}{STAGE_ONE}", ": own expert before stage two"


def _fill(table_row: TableRow, rows: Sequence[Row], gathered: Gathered) -> None:
    """Put in the values of the rows that are of this row's method, and what follows from them.

    Of two rows for one figure the first counts: the own expert as its run has scored it, whose base and gain
    are the references.
    """
    for row in rows:
        if not _is_of(table_row.method, row, gathered):
            continue
        domain, seed = row["domain"], row["seed"]
        by_seed = table_row.values.setdefault((row["metric"], domain), {})
        if seed in by_seed:
            continue
        by_seed[seed] = float(row["value"])
        reference = gathered.references.get((table_row.trunk, seed, domain))
        if row["metric"] == "loss" and reference is not None:
            share = recovered(reference[BASE], float(row["value"]), reference[OWN])
            if share is not None:
                table_row.values.setdefault(("recovered", domain), {})[seed] = share
    _add_means(table_row.values, _asked(table_row.trunk, gathered))
    for measure in gathered.measures:
        same = measure["variant"] == table_row.variant and measure["trunk"] == table_row.trunk
        if same and measure["method"] == table_row.method:
            by_seed = table_row.measures.setdefault(measure["name"], {})
            by_seed.setdefault(measure["seed"], measure["value"])


def _is_of(method: str, row: Row, gathered: Gathered) -> bool:
    """Whether a row is the method's; ``own`` is the expert of the row's domain, by whatever name."""
    named, suffix = method.removesuffix(STAGE_ONE), STAGE_ONE if method.endswith(STAGE_ONE) else ""
    if named != OWN:
        return bool(row["method"] == method)
    expert = gathered.own_experts.get((row["trunk"], row["domain"]), row["domain"])
    return row["method"] in (f"{OWN}{suffix}", f"expert:{expert}{suffix}")


def _asked(trunk: str, gathered: Gathered) -> dict[str, set[str]]:
    """The domains that a trunk's rows have each metric of."""
    found: dict[str, set[str]] = {}
    for row in gathered.rows:
        if row["trunk"] == trunk:
            found.setdefault(row["metric"], set()).add(row["domain"])
    return found


def _add_means(values: Values, asked: Mapping[str, set[str]]) -> None:
    """The mean over domains of each metric, on each seed that has all: a mean of some is no mean of all.

    Of ``recovered`` it is over the domains where there is a gain to recover, which are the same for all rows
    on one trunk and seed.
    """
    for metric in list(dict.fromkeys(metric for metric, _ in values)):
        of_seed: dict[int, dict[str, float]] = {}
        for (other, domain), by_seed in values.items():
            if other == metric:
                for seed, value in by_seed.items():
                    of_seed.setdefault(seed, {})[domain] = value
        wanted = asked.get("loss" if metric == "recovered" else metric, set())
        scored = {d for (other, d) in values if other == ("loss" if metric == "recovered" else metric)}
        whole = [seed for seed, found in of_seed.items() if metric == "recovered" or set(found) >= wanted]
        if scored >= wanted and whole:
            values[metric, MEAN] = {seed: fmean(of_seed[seed].values()) for seed in whole}


def as_figures(values: Mapping[Any, Mapping[int, float]]) -> dict[Any, Figure]:
    """Mean and spread of each entry that has a finite value."""
    found = {}
    for key, by_seed in values.items():
        finite = {seed: value for seed, value in sorted(by_seed.items()) if math.isfinite(value)}
        if finite:
            found[key] = figure_of(finite)
    return found
