"""The table of a comparison as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from dsmixer.report.comparison_values import (
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

CSV_COLUMNS = ("row", "kind", "quantity", "domain", "mean", "spread", "spread_is", "seeds", "values")


def markdown(results: Results) -> str:
    """All tables of a comparison as Markdown."""
    parts = [f"# {_plain(results['title'])}", *_about(results)]
    for metric in metrics_of(results):
        parts += [f"## {metric_title(metric)} ({better(metric)})", _metric_table(results, metric)]
    parts += _paired(results)
    names = measures_there(results)
    if names:
        notes = " ".join(MEASURE_NOTES[name] for name in names if name in MEASURE_NOTES)
        parts += ["## Measures", _measure_table(results, names), notes]
    for figures in results["paper"] or ():
        head = f"## Figures of {_plain(results['source'] or 'the paper')}: {_plain(figures['metric'])}"
        parts += [f"{head}, {figures['unit']}" if figures["unit"] else head, _paper_table(results, figures)]
    parts += [PAPER_NOTE] if results["paper"] else []
    parts += ["## How to make it again", f"    {command_of(results)}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(results: Results) -> Iterator[str]:
    source = f"Counterpart of {_plain(results['source'])}. " if results["source"] else ""
    scale = f"Scale: {results['scale']}. " if results["scale"] else ""
    yield f"{source}{scale}Base model: {_plain(results['base'])}."
    yield _plain(results["note"] or "")
    yield _plain(missing_note(results))
    yield spread_note(results)


def _metric_table(results: Results, metric: str) -> str:
    columns = columns_of(results, metric)
    best = {column: best_of(results, metric, column) for column in columns}
    lines = []
    for row in rows_with(results, metric):
        texts = [figure_text(metric, cell_of(row, metric, column)) for column in columns]
        marked = [
            f"**{text}**" if row["row"] in best[column] else text
            for text, column in zip(texts, columns, strict=True)
        ]
        lines.append([row["row"], *marked])
    return _table(["", *columns], lines)


def _paired(results: Results) -> list[str]:
    """The differences from the first variant, a table a metric."""
    parts = []
    for metric in metrics_of(results):
        first, rows = paired(results, metric)
        if rows:
            lines = [[name, signed_text(metric, figure)] for name, figure in rows]
            parts.append(
                _table(
                    [f"{metric_title(metric)}: difference from {first}", columns_of(results, metric)[-1]],
                    lines,
                )
            )
    return [f"## Seed by seed\n\n{PAIRED_NOTE}", *parts] if parts else []


def _measure_table(results: Results, names: Sequence[str]) -> str:
    rows = [row for row in results["table"] if any(name in row["measures"] for name in names)]
    lines = [[row["row"], *(figure_text(name, row["measures"].get(name)) for name in names)] for row in rows]
    return _table(["", *(MEASURE_TITLES.get(name, name) for name in names)], lines)


def _paper_table(results: Results, figures: Results) -> str:
    columns = list(dict.fromkeys(column for row in figures["rows"].values() for column in row))
    lines = []
    for name, values in figures["rows"].items():
        texts = []
        for column in columns:
            own = paper_match(results, figures["metric"], figures["unit"], name, column)
            here = f" (here {own})" if own is not None else ""
            texts.append(f"{values[column]:g}{here}" if column in values else "")
        lines.append([name, *texts])
    return _table(["", *columns], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---", *("---:" for _ in head[1:])], *lines]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows)


def _plain(text: str) -> str:
    """A text in a line of Markdown, in which it can neither end a cell nor begin markup of its own."""
    line = " ".join(str(text).split())
    return line.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def table_csv(results: Results) -> str:
    """One line a row of the table, quantity (metric or measure) and domain, for programs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in results["table"]:
        quantities = [
            (metric, domain, figure)
            for metric, cells in row["cells"].items()
            for domain, figure in cells.items()
        ]
        quantities += [(name, "", figure) for name, figure in row["measures"].items()]
        for quantity, domain, figure in quantities:
            spread = ["", ""] if figure["spread"] is None else [figure["spread"], figure["spread_is"]]
            seeds, values = (
                ";".join(map(str, part)) for part in (figure["values"], figure["values"].values())
            )
            writer.writerow(
                [row["row"], row["kind"], quantity, domain, figure["mean"], *spread, seeds, values]
            )
    return out.getvalue()
