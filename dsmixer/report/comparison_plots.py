"""The plots of a comparison: scores with their spread, lines and grids over its axes, and its routers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsmixer.report.colors import EDGE, INK, MUTED
from dsmixer.report.comparison_values import (
    MEASURE_TITLES,
    SHARES,
    Results,
    better,
    cell_of,
    columns_of,
    measures_there,
    metric_title,
    metrics_of,
    number,
    scaled,
)
from dsmixer.report.limits import MAX_SHOWN, evenly, largest, shown, with_remarks
from dsmixer.report.plots import CYCLE, LOAD, Curve, HeatMap, heat_figure, line_figure, look
from dsmixer.report.text import MISSING

MAX_BARS = 40
MAX_LINES = 8
MAX_WRITTEN = 16
MAX_TICKS = 16
Named = tuple[str, str, Figure]
"""Name of the plot's file, its caption, and the figure."""


def figures_of(results: Results) -> Iterator[Named]:
    """The plots that the comparison asks for, of what is there."""
    kinds: dict[str, Callable[[Results], Iterator[Named]]] = {
        "scores": _scores,
        "lines": _lines,
        "grid": _grids,
        "loads": _loads,
        "entropy": _entropy,
        "losses": _losses,
    }
    for kind in results["plots"]:
        yield from kinds[kind](results)


def _scores(results: Results) -> Iterator[Named]:
    for metric in metrics_of(results):
        column = columns_of(results, metric)[-1]
        rows = [row for row in results["table"] if cell_of(row, metric, column) is not None]
        if not rows:
            continue
        title = with_remarks(
            f"{metric_title(metric)}",
            f"{column}, {better(metric)}",
            shown("rows", "first", min(len(rows), MAX_BARS), len(rows)),
        )
        yield f"scores-{_file(metric)}", title, _bars(metric, column, rows[:MAX_BARS], title)


def _bars(metric: str, column: str, rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A bar a row, the seeds as points on it, and its spread."""
    with look():
        figure = Figure(figsize=(4.6, 1.2 + 0.3 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            cell = cell_of(row, metric, column)
            assert cell is not None
            mean = scaled(metric, cell["mean"])
            color = {"method": CYCLE[1], "variant": CYCLE[0]}.get(row["kind"], EDGE)
            axes.barh(place, mean, height=0.62, color=color, alpha=0.85)
            seeds = [scaled(metric, value) for value in cell["values"].values()]
            if len(seeds) > 1:
                _error(axes, place, mean, seeds, cell)
            end = (max([mean, 0.0, *seeds]), place)
            text = number(metric, cell["mean"])
            axes.annotate(text, end, (5, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK)
        axes.set_yticks(range(len(rows)), [_short(row["row"]) for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_title(title)
        axes.grid(axis="x")
    return figure


def _error(axes: Axes, place: int, mean: float, seeds: Sequence[float], cell: Mapping[str, Any]) -> None:
    """A line over the spread: a standard deviation to both sides, or from one of two seeds to the other."""
    low, high = min(seeds), max(seeds)
    if cell["spread_is"] == "standard deviation":
        spread = float(np.std(seeds, ddof=1))
        low, high = mean - spread, mean + spread
    axes.hlines(place, low, high, color=INK, linewidth=1.2)
    axes.scatter(seeds, [place] * len(seeds), s=9, facecolor="white", edgecolor=INK, linewidth=0.7, zorder=3)


def _lines(results: Results) -> Iterator[Named]:
    """Each metric over the first axis; a line for each variant and point of the other axes."""
    if not results["axes"]:
        return
    axis = results["axes"][0]
    series = {told or axis["name"]: rows for told, rows in _series(results, [axis["name"]]).items()}
    metrics = [(metric, columns_of(results, metric)[-1]) for metric in metrics_of(results)]
    for metric, column in metrics:
        title = with_remarks(
            metric_title(metric),
            f"{column}, {better(metric)}",
            shown("lines", "first", min(len(series), MAX_LINES), len(series)),
        )
        yield f"lines-{_file(metric)}", title, _line_plot(results, axis, series, metric, column, title)


def _series(results: Results, axes: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows that have a point, apart by variant, where there are several, and by all axes but these."""
    rows = [row for row in results["table"] if row["point"]]
    several = len({row["name"] for row in rows}) > 1
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        rest = [f"{name}={value}" for name, value in row["point"].items() if name not in axes]
        found.setdefault(", ".join([*([row["name"]] if several else []), *rest]), []).append(row)
    return found


def _line_plot(
    results: Results,
    axis: Mapping[str, Any],
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    metric: str,
    column: str,
    title: str,
) -> Figure:
    numeric = all(_is_number(value) for value in axis["values"])
    places = {value: float(value) if numeric else float(i) for i, value in enumerate(axis["values"])}
    with look():
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for color, (name, rows) in zip(CYCLE, list(series.items())[:MAX_LINES], strict=False):
            points = [(places[row["point"][axis["name"]]], cell_of(row, metric, column)) for row in rows]
            known = sorted(((x, cell) for x, cell in points if cell is not None), key=lambda point: point[0])
            x = [place for place, _ in known]
            y = [scaled(metric, cell["mean"]) for _, cell in known]
            errors = [_half(metric, cell) for _, cell in known]
            axes.errorbar(x, y, yerr=errors, color=color, marker="o", markersize=4, capsize=2.5, label=name)
        _reference_lines(axes, results, metric, column)
        axes.set(xlabel=axis["name"])
        axes.set_xticks(list(places.values()), [_short(value) for value in places])
        axes.set_title(title)
        axes.grid(axis="y")
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend()
    return figure


def _half(metric: str, cell: Mapping[str, Any]) -> float:
    """Half the length of a point's bar: the standard deviation, or half the range."""
    if cell["spread"] is None:
        return 0.0
    spread = scaled(metric, cell["spread"])
    return spread if cell["spread_is"] == "standard deviation" else spread / 2


def _reference_lines(axes: Axes, results: Results, metric: str, column: str) -> None:
    """Rows that no axis changes, drawn across: only where they are few."""
    rows = [row for row in results["table"] if not row["point"] and cell_of(row, metric, column)]
    if len(rows) > 4:
        return
    for row, style in zip(rows, ((0, (4, 3)), (0, (1, 2)), (0, (6, 2, 1, 2)), (0, (8, 3))), strict=False):
        cell = cell_of(row, metric, column)
        assert cell is not None
        axes.axhline(
            scaled(metric, cell["mean"]), color=MUTED, linestyle=style, linewidth=1, label=row["row"]
        )


def _grids(results: Results) -> Iterator[Named]:
    """The first two axes as heat maps of each metric and measure, one for each point of all the rest."""
    if len(results["axes"]) < 2:
        return
    for told, rows in _series(results, [axis["name"] for axis in results["axes"][:2]]).items():
        for quantity in [*metrics_of(results), *measures_there(results)]:
            values = _grid(results, rows, quantity)
            if np.isfinite(values).any():
                column = columns_of(results, quantity)[-1:] if quantity in results["columns"] else []
                title = MEASURE_TITLES.get(quantity) or metric_title(quantity)
                title = with_remarks(title, *([told] if told else []), *column)
                file = f"grid-{_file(quantity)}" + (f"-{_file(told)}" if told else "")
                yield file, title, _grid_figure(results, values, quantity, title)


def _grid(results: Results, rows: Sequence[Mapping[str, Any]], quantity: str) -> np.ndarray:
    """Means by value of the first axis (down) and of the second (across), in the unit of the plot."""
    down, across = results["axes"][:2]
    values = np.full((len(down["values"]), len(across["values"])), math.nan)
    for row in rows:
        place = (
            down["values"].index(row["point"][down["name"]]),
            across["values"].index(row["point"][across["name"]]),
        )
        cell = row["measures"].get(quantity)
        if quantity in results["columns"]:
            columns = columns_of(results, quantity)
            cell = cell_of(row, quantity, columns[-1]) if columns else None
        if cell is not None:
            values[place] = cell["mean"]
    return values


def _grid_figure(results: Results, values: np.ndarray, quantity: str, title: str) -> Figure:
    down, across = results["axes"][:2]
    texts = [[MISSING if math.isnan(value) else number(quantity, value) for value in row] for row in values]
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    heat_map = HeatMap(
        values,
        [f"{down['name']}={value}" for value in down["values"]],
        [f"{across['name']}={value}" for value in across["values"]],
        low,
        high if high > low else low + 1e-9,
        quantity.replace("_", " "),
        texts,
        LOAD,
        percent=quantity in SHARES,
    )
    return heat_figure(heat_map, title=title)


def _loads(results: Results) -> Iterator[Named]:
    for label, curve in results["curves"].get("loads", {}).items():
        load = np.array(curve["load"], dtype=float)
        domains = evenly(load.shape[0])
        experts = largest(np.nan_to_num(load).sum(0), MAX_SHOWN)
        values = load[np.ix_(domains, experts)]
        title = with_remarks(
            "First expert of a held-out token, by domain",
            label,
            shown("domains", "evenly picked", len(domains), load.shape[0]),
            shown("experts", "largest", len(experts), load.shape[1]),
        )
        texts = None
        if len(experts) <= MAX_WRITTEN:
            texts = [["" if math.isnan(v) else f"{100 * v:.0f}" for v in row] for row in values]
        rows, columns = [curve["domains"][g] for g in domains], [curve["experts"][e] for e in experts]
        heat_map = HeatMap(values, rows, columns, 0, 1, "share of tokens", texts, percent=True)
        yield f"loads-{_file(label)}", title, heat_figure(heat_map, title=title)


def _entropy(results: Results) -> Iterator[Named]:
    curves = results["curves"].get("entropy", {})
    if not curves:
        return
    drawn = dict(list(curves.items())[:MAX_LINES])
    layers = _in_order(curve["layers"] for curve in drawn.values())
    lines = []
    for label, curve in drawn.items():
        values = np.array([math.nan if value is None else value for value in curve["values"]], dtype=float)
        lines.append(Curve(label, np.array([layers.index(name) for name in curve["layers"]], float), values))
    x = np.arange(len(layers), dtype=float)
    for limit in dict.fromkeys(curve["limit"] for curve in drawn.values()):
        told = f"ln {math.exp(limit):.0f}, the most there can be"
        lines.append(Curve(told, x, np.full(len(x), limit), limit=True))
    title = with_remarks(
        "Routing entropy of held-out tokens, by layer",
        shown("variants", "first", len(drawn), len(curves)),
    )
    yield "entropy", title, _named(line_figure(lines, title=title, unit="nats", x_label="layer"), layers)


def _in_order(lists: Iterable[Sequence[str]]) -> list[str]:
    """All layers of several mixtures, by side and number; those that have no number come last."""
    return sorted(dict.fromkeys(name for names in lists for name in names), key=_place)


def _place(layer: str) -> tuple[bool, bool, int, str]:
    side, _, number = layer.rpartition(" ")
    return not number.isdigit(), side == "decoder", int(number) if number.isdigit() else 0, layer


def _named(figure: Figure, names: Sequence[str]) -> Figure:
    """The figure with names along its x axis, as many as there is room for."""
    shown_there = evenly(len(names), MAX_TICKS)
    figure.axes[0].set_xticks(shown_there, [names[index] for index in shown_there])
    return figure


def _losses(results: Results) -> Iterator[Named]:
    curves = results["curves"].get("losses", {})
    if not curves:
        return
    lines = []
    for label, curve in list(curves.items())[:MAX_LINES]:
        steps, values = (np.array(curve[key], dtype=float) for key in ("steps", "values"))
        lines.append(Curve(label, steps, values, noisy=True))
    title = with_remarks(
        "Routing loss over the steps of stage two",
        "mean over seeds, as it enters the loss",
        shown("variants", "first", len(lines), len(curves)),
    )
    yield "losses", title, _whole(line_figure(lines, title=title, unit="nats"))


def _whole(figure: Figure) -> Figure:
    """The figure with whole numbers alone along its x axis."""
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _file(name: str) -> str:
    """A name as part of a file's name."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._=+-") else "-" for c in name)
    return plain.strip(".-")[:60] or "x"


def _short(name: str, limit: int = 32) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"
