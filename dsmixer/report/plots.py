"""Line plots and heat maps in one look, as matplotlib figures without a display."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from dsmixer.report.colors import EDGE, GAIN_SCALE, GRID, INK, LOAD_SCALE, MUTED, PALETTE
from dsmixer.report.text import harmless

CYCLE = PALETTE
LOAD = LinearSegmentedColormap.from_list("load", LOAD_SCALE)
GAIN = LinearSegmentedColormap.from_list("gain", GAIN_SCALE)
ON_CELL = "#1c2431"  # text on a coloured cell, which is the same on a dark page
NOTHING = "#d5d9e0"  # a cell that was not measured
MAX_TICKS, MAX_MARKED = 12, 48
MAX_POINTS = 600  # of one curve: a page stays small however long the run was

_LOOK: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": EDGE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with a dollar sign is a name
}


@contextmanager
def look() -> Iterator[None]:
    """The one look of all figures, while they are made and drawn."""
    with matplotlib.rc_context(_LOOK):
        yield


@dataclass(frozen=True)
class Curve:
    """One curve of a line plot.

    Attributes:
        label: name in the legend.
        x, y: its points; NaN in ``y`` is a gap.
        noisy: whether the points are drawn pale under their running mean.
        limit: whether it is a bound, drawn dashed.
        marked: whether each point has a dot.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    noisy: bool = False
    limit: bool = False
    marked: bool = False


def line_figure(
    curves: Sequence[Curve],
    *,
    title: str,
    unit: str,
    x_label: str = "step",
    x_names: Sequence[str] = (),
    y_from: float | None = None,
) -> Figure:
    """A line plot of a size that stays readable on a phone.

    Args:
        curves: at least one.
        title, unit, x_label: of the figure and its axes.
        x_names: of the points 0, 1, …, where they are no numbers; of many only some are written.
        y_from: where the axis of values starts.
    """
    with look():
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        colors = iter(CYCLE)
        for curve in curves:
            _draw_curve(axes, curve, MUTED if curve.limit else next(colors))
        axes.set(title=title, xlabel=x_label, ylabel=unit)
        axes.grid(axis="y")
        axes.margins(x=0.02)
        if x_names:
            places = range(0, len(x_names), -(-len(x_names) // MAX_TICKS))
            name_places(axes, list(places), [x_names[place] for place in places])
        if y_from is not None:
            axes.set_ylim(bottom=y_from)
        if len(curves) > 4:
            figure.legend(loc="outside lower center", ncols=3)
        elif len(curves) > 1:
            axes.legend()
    return figure


def _draw_curve(axes: Axes, curve: Curve, color: str) -> None:
    x, y = thin(curve.x, curve.y)
    label = harmless(curve.label, keep="")
    marker = "o" if len(x) <= 2 or (curve.marked and len(x) <= MAX_MARKED) else None
    if curve.limit:
        axes.plot(x, y, color=color, linestyle=(0, (4, 3)), linewidth=1.1, label=label)
        return
    if not curve.noisy or len(y) < 12:
        axes.plot(x, y, color=color, linewidth=1.6, label=label, marker=marker, markersize=4)
        return
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(x, running_mean(y, max(3, len(y) // 20)), color=color, linewidth=1.7, label=label)


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``limit`` points: means over equal stretches of the curve, NaN where a stretch has no value."""
    if len(x) <= limit:
        return x, y
    bounds = np.linspace(0, len(x), limit + 1).astype(int)[:-1]
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite.astype(float), bounds)
    sums = np.add.reduceat(np.where(finite, y, 0.0), bounds)
    lengths = np.diff([*bounds, len(x)])
    means = np.divide(sums, counts, out=np.full(limit, np.nan), where=counts > 0)
    return np.add.reduceat(x.astype(float), bounds) / lengths, means


def running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Mean of the ``width`` last points that are numbers, at each point."""
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(finite)])
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(0, ends - width)
    number = counts[ends] - counts[starts]
    return np.divide(sums[ends] - sums[starts], number, out=np.full(len(y), np.nan), where=number > 0)


@dataclass(frozen=True)
class HeatMap:
    """A matrix with names.

    Attributes:
        values: ``[rows, columns]``; decides the colour, NaN is grey.
        rows, columns: names along both sides.
        low, high: values of the two ends of the colours; values beyond take the end's colour.
        unit: what the colour means.
        texts: what is written in each cell, or None.
        colors: the colour scale.
        gap: columns from here on stand a little apart.
        percent: whether the colour bar counts in percent.
    """

    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    low: float
    high: float
    unit: str
    texts: Sequence[Sequence[str]] | None = None
    colors: Colormap = field(default_factory=lambda: LOAD)
    gap: int | None = None
    percent: bool = False


def heat_figure(heat_map: HeatMap, *, title: str) -> Figure:
    """A heat map with its colour bar, as large as its number of cells asks for."""
    num_rows, num_columns = heat_map.values.shape
    cell = 0.5 if heat_map.texts is not None else 0.3 if max(num_rows, num_columns) <= 24 else 0.17
    width = min(14.0, max(4.6, 1.9 + cell * num_columns))
    height = min(14.0, max(2.9, 1.3 + min(cell, 0.34) * num_rows))
    with look():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        draw_heat_map(axes, heat_map)
        # above the names of the rows as well: the cells of few columns are no wide place for a title
        figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    return figure


def draw_heat_map(axes: Axes, heat_map: HeatMap) -> None:
    """Draw into axes of a figure made under :func:`look`."""
    values, num_columns = heat_map.values, heat_map.values.shape[1]
    edges = np.arange(num_columns + 1, dtype=float)
    parts = [(0, num_columns)]
    if heat_map.gap is not None:
        parts = [(0, heat_map.gap), (heat_map.gap, num_columns)]
        edges = np.where(np.arange(num_columns + 1) >= heat_map.gap, edges + 0.25, edges)
    colors, norm = heat_map.colors.with_extremes(bad=NOTHING), Normalize(heat_map.low, heat_map.high)
    for begin, end in parts:
        left = edges[begin]
        x = np.concatenate([left + np.arange(end - begin), [left + end - begin]])
        y = np.arange(values.shape[0] + 1)
        part = np.ma.masked_invalid(values[:, begin:end])
        lines: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.8} if max(values.shape) <= 24 else {}
        mesh = axes.pcolormesh(x, y, part, cmap=colors, norm=norm, rasterized=values.size > 400, **lines)
    centers = edges[:-1] + 0.5
    _name_cells(axes, heat_map, centers)
    _write_cells(axes, heat_map, centers, norm)
    _draw_color_bar(axes, heat_map, mesh)


def _draw_color_bar(axes: Axes, heat_map: HeatMap, mesh: QuadMesh) -> None:
    known = heat_map.values[np.isfinite(heat_map.values)]
    below, above = (known < heat_map.low).any(), (known > 1.005 * heat_map.high).any()
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02, extend=extend)
    if heat_map.percent:
        ticks = np.linspace(heat_map.low, heat_map.high, 5).tolist()
        bar.set_ticks(ticks, labels=[f"{tick:.0%}" for tick in ticks])
    bar.set_label(heat_map.unit)
    bar.outline.set_visible(False)


def _name_cells(axes: Axes, heat_map: HeatMap, centers: np.ndarray) -> None:
    num_rows, num_columns = heat_map.values.shape
    name_places(axes, centers, heat_map.columns, steep=num_columns > 24)
    axes.tick_params(axis="x", labelsize=8 if num_columns <= 24 else 5.5)
    row_names, row_size = [_short(name) for name in heat_map.rows], 8 if num_rows <= 24 else 5.5
    axes.set_yticks(np.arange(num_rows) + 0.5, row_names, fontsize=row_size)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def name_places(
    axes: Axes, places: Sequence[float] | np.ndarray, names: Sequence[str], *, steep: bool = False
) -> None:
    """Name places of the horizontal axis; names of more than three letters are turned, to lie side by side.

    Args:
        axes: of a figure made under :func:`look`.
        places, names: as many of each.
        steep: whether there are so many that turned names have to stand upright.
    """
    turn: dict[str, Any] = {}
    if max(map(len, names), default=0) > 3:
        turn = {"rotation": 90} if steep else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(places, [_short(name) for name in names], **turn)


def _write_cells(axes: Axes, heat_map: HeatMap, centers: np.ndarray, norm: Normalize) -> None:
    if heat_map.texts is None:
        return
    for row, texts in enumerate(heat_map.texts):
        for column, text in enumerate(texts):
            red, green, blue, _ = heat_map.colors(norm(np.nan_to_num(heat_map.values[row, column])))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
            color = "white" if dark and np.isfinite(heat_map.values[row, column]) else ON_CELL
            axes.text(centers[column], row + 0.5, text, ha="center", va="center", color=color, fontsize=7.5)


def _short(name: str, limit: int = 28) -> str:
    name = harmless(name, keep="")
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def as_svg(figure: Figure) -> str:
    """The figure as SVG text without a ground, the same bytes for the same figure."""
    buffer = io.StringIO()
    with look(), matplotlib.rc_context({"svg.hashsalt": "dsmixer"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue()


def as_pixels(figure: Figure, dpi: int = 110) -> np.ndarray:
    """The figure as ``uint8 [height, width, 3]``."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with look():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
