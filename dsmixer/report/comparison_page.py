"""What is made of a comparison: table, plots, and one page that needs nothing beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmixer.report.comparison_plots import Named, figures_of
from dsmixer.report.comparison_tables import markdown, table_csv
from dsmixer.report.comparison_values import (
    COMPETING,
    MEASURE_NOTES,
    MEASURE_TITLES,
    PAIRED_NOTE,
    PAPER_NOTE,
    Results,
    best_of,
    better,
    cell_of,
    columns_of,
    command_of,
    figure_text,
    measures_there,
    metric_title,
    metrics_of,
    missing_note,
    paired,
    paper_match,
    rows_with,
    signed_text,
    spread_note,
)
from dsmixer.report.css import CSS
from dsmixer.report.frames import definitions, note, section
from dsmixer.report.frames import figures as drawn
from dsmixer.report.html import Markup, join, tag
from dsmixer.report.plots import as_svg

OWN_CSS = """
tr.reference > * { color: var(--muted); }
thead th.number { white-space: normal; min-width: 5em; vertical-align: bottom; }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--card); min-width: 7em; }
@media (min-width: 800px) { tbody th { white-space: nowrap; } }
.warning { border-left: 4px solid #d55e00; background: var(--card); padding: 8px 12px; margin: 14px 0; }
.here { display: block; color: var(--muted); font-size: 12px; }
@media print { tbody th, thead th:first-child { position: static; } }
"""


def write_comparison(folder: Path, results: Results) -> dict[str, str]:
    """Write table, plots and page of a comparison into its folder, over earlier ones.

    Args:
        folder: of the comparison.
        results: what its ``results.json`` holds.

    Returns:
        Paths by what they are: ``table``, ``csv``, ``plots``, ``page``.
    """
    figures = _once(list(figures_of(results)))
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.svg"):
        if old.stem not in {name for name, _, _ in figures}:
            old.unlink()
    texts = {folder / "table.md": markdown(results), folder / "table.csv": table_csv(results)}
    texts |= {plots / f"{name}.svg": as_svg(figure) for name, _, figure in figures}
    texts[folder / "index.html"] = render(results, figures)
    for path, text in texts.items():
        _write(path, text)
    return {
        "table": str(folder / "table.md"),
        "csv": str(folder / "table.csv"),
        "plots": str(plots),
        "page": str(folder / "index.html"),
    }


def _once(figures: Sequence[Named]) -> list[Named]:
    """Each plot under a name of its own: names of variants may come down to one."""
    found: dict[str, Named] = {}
    for name, caption, figure in figures:
        own, number = name, 2
        while own in found:
            own, number = f"{name}-{number}", number + 1
        found[own] = (own, caption, figure)
    return list(found.values())


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def render(results: Results, figures: Sequence[Named]) -> str:
    """The page as text.

    Args:
        results: of the comparison.
        figures: name, caption and figure of each plot.
    """
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", results["title"]),
        tag("style", Markup(CSS + OWN_CSS)),
    )
    body = join(
        tag("header", tag("h1", results["title"]), tag("p", _subtitle(results))),
        _notes(results),
        _scores(results),
        _paired(results),
        _measures(results),
        _paper(results),
        section("Plots", drawn("plot", [(caption, figure) for _, caption, figure in figures]), key="plots"),
        _compared(results),
        _again(results),
    )
    page = tag("html", tag("head", head), tag("body", tag("main", body)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _subtitle(results: Results) -> str:
    parts = [f"Counterpart of {results['source']}" if results["source"] else "A comparison"]
    parts.append(f"over {results['base']}")
    parts.append(f"scale {results['scale']}" if results["scale"] else "")
    return " · ".join(part for part in parts if part)


def _notes(results: Results) -> Markup:
    missing = missing_note(results)
    return join(
        tag("p", missing, class_="warning") if missing else "",
        tag("p", results["note"]) if results["note"] else "",
        note(spread_note(results)),
    )


def _scores(results: Results) -> Markup:
    parts = []
    for metric in metrics_of(results):
        parts += [tag("h3", f"{metric_title(metric)} ({better(metric)})"), _metric_table(results, metric)]
    if not parts:
        return Markup("")
    text = (
        "On held-out data. The best mean of a column among variants and other methods is marked; whether it "
        "is more than chance, the spread says. Grey rows are what the others are held against, or are told "
        "the domain, which a mixture is not."
    )
    return section("Results", note(text), *parts, key="results")


def _metric_table(results: Results, metric: str) -> Markup:
    columns = columns_of(results, metric)
    best = {column: best_of(results, metric, column) for column in columns}
    rows = []
    for row in rows_with(results, metric):
        cells = [
            tag(
                "td",
                figure_text(metric, cell_of(row, metric, column)),
                class_="number best" if row["row"] in best[column] else "number",
            )
            for column in columns
        ]
        rows.append(_row(row, cells))
    return _table(columns, rows)


def _paired(results: Results) -> Markup:
    """The differences from the first variant, a table a metric."""
    parts = []
    for metric in metrics_of(results):
        first, rows = paired(results, metric)
        if rows:
            column = columns_of(results, metric)[-1]
            cells = [(name, signed_text(metric, figure)) for name, figure in rows]
            lines = [
                tag("tr", tag("th", name, scope="row"), tag("td", text, class_="number"))
                for name, text in cells
            ]
            parts += [tag("h3", f"{metric_title(metric)}: difference from {first}"), _table([column], lines)]
    return section("Seed by seed", note(PAIRED_NOTE), *parts, key="paired") if parts else Markup("")


def _measures(results: Results) -> Markup:
    names = measures_there(results)
    if not names:
        return Markup("")
    rows = [
        _row(
            row, [tag("td", figure_text(name, row["measures"].get(name)), class_="number") for name in names]
        )
        for row in results["table"]
        if any(name in row["measures"] for name in names)
    ]
    notes = " ".join(MEASURE_NOTES[name] for name in names if name in MEASURE_NOTES)
    table = _table([MEASURE_TITLES.get(name, name) for name in names], rows)
    return section("Measures", note(notes), table, key="measures")


def _paper(results: Results) -> Markup:
    parts = []
    for figures in results["paper"] or ():
        columns = list(dict.fromkeys(column for row in figures["rows"].values() for column in row))
        rows = []
        for name, values in figures["rows"].items():
            cells = [_paper_cell(results, figures, name, values, column) for column in columns]
            rows.append(tag("tr", tag("th", name, scope="row"), *cells))
        unit = f", {figures['unit']}" if figures["unit"] else ""
        parts += [tag("h3", f"{figures['metric']}{unit}"), _table(columns, rows)]
    if not parts:
        return Markup("")
    title = f"Figures of {results['source']}" if results["source"] else "Figures of the paper"
    return section(title, note(PAPER_NOTE), *parts, key="paper")


def _paper_cell(
    results: Results, figures: Mapping[str, Any], row: str, values: Mapping[str, float], column: str
) -> Markup:
    if column not in values:
        return tag("td", class_="number")
    own = paper_match(results, figures["metric"], figures["unit"], row, column)
    here = tag("span", f"here {own}", class_="here") if own is not None else ""
    return tag("td", f"{values[column]:g}", here, class_="number")


def _compared(results: Results) -> Markup:
    """What each variant changes in the recipe."""
    entries = []
    for label in results["variants"]:
        settings = results["settings"][label]
        told = "; ".join(f"{key} = {value}" for key, value in settings.items()) or "the recipe as it stands"
        entries.append((label, told))
    return section("What was compared", definitions(entries), key="compared")


def _again(results: Results) -> Markup:
    return section("How to make it again", tag("pre", command_of(results)), key="again")


def _row(row: Mapping[str, Any], cells: Sequence[Markup]) -> Markup:
    own_class = None if row["kind"] in COMPETING else "reference"
    return tag("tr", tag("th", row["row"], scope="row"), *cells, class_=own_class)


def _table(columns: Sequence[str], rows: Sequence[Markup]) -> Markup:
    head = tag("tr", tag("th"), *(tag("th", column, class_="number") for column in columns))
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="card", tabindex="0")
