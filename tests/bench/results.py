"""What was measured: rows, the table, the file, the plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.case import Case
from tests.bench.systems.registry import SYSTEMS
from tests.bench.targets import Verdict
from tests.bench.timing import Spread


@dataclass(frozen=True)
class Row:
    """A system on a case; without figures where it has a problem.

    Attributes:
        case: the shapes.
        system: name in ``SYSTEMS``.
        problem: why there is nothing.
        seconds: of a step or a decoded token.
        to_lora: times PEFT LoRA, within rounds.
        to_base: times the frozen base, within rounds.
        to_ours: times ours, within rounds.
        peak: bytes beyond those of the process before anything was built.
        trained: weights that train.
        loss: of the first step, nats a target token.
        gradient_norm: of the first step.
        tokens_per_second: at the median.
        share: of the machine's matmul rate, in model operations, within rounds.
        matmul: operations a second of a large product, median of the rounds.
    """

    case: Case
    system: str
    problem: str | None = None
    seconds: Spread | None = None
    to_lora: Spread | None = None
    to_base: Spread | None = None
    to_ours: Spread | None = None
    peak: int | None = None
    trained: int | None = None
    loss: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = None
    share: float | None = None
    matmul: float | None = None

    @property
    def title(self) -> str:
        return SYSTEMS[self.system].title_of(self.case.what)


COLUMNS = ("system", "ms", "x LoRA", "quartiles", "x base", "peak GB", "tokens/s", "of matmul rate")


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, in the order of ``COLUMNS``."""
    if row.seconds is None:
        return (row.title, *[""] * (len(COLUMNS) - 2), row.problem or "")
    lora, base = row.to_lora, row.to_base
    assert row.peak is not None
    return (
        row.title,
        f"{1e3 * row.seconds.median:,.2f}",
        "" if lora is None else f"{lora.median:.3f}",
        "" if lora is None else ("one step" if lora.number == 1 else f"{lora.low:.3f} to {lora.high:.3f}"),
        "" if base is None else f"{base.median:.3f}",
        f"{row.peak / 1e9:.3f}",
        f"{row.tokens_per_second:,.0f}",
        "" if row.share is None or row.case.what == "decode" else f"{row.share:.1%}",
    )


def by_case(rows: Iterable[Row]) -> list[tuple[Case, list[Row]]]:
    return [(case, list(found)) for case, found in groupby(rows, key=lambda row: row.case)]


def show(rows: Sequence[Row]) -> None:
    """A table a case."""
    for case, found in by_case(rows):
        table = Table(*COLUMNS, title=case.title(), title_justify="left")
        for column in table.columns[1:-1]:
            column.justify = "right"
        for row in found:
            table.add_row(*cells(row))
        Console(width=130).print(table)


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """The targets."""
    table = Table("target", "case", "limit", "measured", "", title="targets", title_justify="left")
    for verdict in verdicts:
        table.add_row(*verdict.cells())
    Console(width=130).print(table)


def markdown(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> str:
    """The same tables, for a page."""
    parts = []
    for case, found in by_case(rows):
        parts += [f"{case.title()}:", "", *markdown_table(COLUMNS, [cells(row) for row in found]), ""]
    targets = markdown_table(
        ("target", "case", "limit", "measured", ""), [verdict.cells() for verdict in verdicts]
    )
    return "\n".join([*parts, *targets, ""])


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines."""
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def write(path: Path, facts: dict[str, Any], rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Everything as JSON."""
    found = {
        "facts": facts,
        "rows": [asdict(row) for row in rows],
        "targets": [verdict.to_dict() for verdict in verdicts],
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that ``write`` made."""
    spreads = ("seconds", "to_lora", "to_base", "to_ours")
    rows = []
    for values in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        values["case"] = Case.from_dict(values["case"])
        values |= {name: Spread(**values[name]) for name in spreads if values[name] is not None}
        rows.append(Row(**values))
    return rows


def plot(rows: Sequence[Row], path: Path) -> bool:
    """A line for each case, a dot for each system: training in times PEFT LoRA, decoding in times the frozen
    base; whether there was anything to draw."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    kinds = {
        "training, times PEFT LoRA": [row for row in rows if row.case.what == "train" and row.to_lora],
        "decoding, times the frozen base": [row for row in rows if row.case.what == "decode" and row.to_base],
    }
    kinds = {title: of_kind for title, of_kind in kinds.items() if of_kind}
    if not kinds:
        return False
    lengths = [len({row.case for row in of_kind}) for of_kind in kinds.values()]
    figure, axes = plt.subplots(
        len(kinds),
        1,
        figsize=(9, 1.5 * len(kinds) + 0.3 * sum(lengths)),
        height_ratios=[length + 2 for length in lengths],
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, of_kind) in zip(axes.flat, kinds.items(), strict=True):
        _draw(axis, title, of_kind)
    figure.savefig(path)
    plt.close(figure)
    return True


def _draw(axis: Any, title: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    cases = sorted({row.case for row in rows}, key=lambda case: (case.experts, case.rank, case.width))
    for number, name in enumerate(SYSTEMS):
        own = [row for row in rows if row.system == name]
        found = [(row, row.to_lora if row.case.what == "train" else row.to_base) for row in own]
        dots = [(spread, cases.index(row.case)) for row, spread in found if spread is not None]
        if not dots:
            continue
        middle = [spread.median for spread, _ in dots]
        errors = [[s.median - s.low for s, _ in dots], [s.high - s.median for s, _ in dots]]
        marker = "D" if name.startswith("stage") else "o"
        label = SYSTEMS[name].title_of(own[0].case.what)
        places = [place for _, place in dots]
        axis.errorbar(middle, places, xerr=errors, fmt=marker, color=f"C{number}", capsize=2, label=label)
    axis.axvline(1.0, color="0.6", linewidth=1, zorder=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(range(len(cases)), [_label(case) for case in cases], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="y", color="0.92")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _label(case: Case) -> str:
    length = f", {case.tokens:,} tokens" if case.what == "train" else ""
    return f"E={case.experts}, r={case.rank}, width {case.width}, {case.dtype}{length}"
