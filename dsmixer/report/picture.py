"""One wide picture of a run's result: what each expert is worth, and how often the routers find it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsmixer.config.errors import UserError
from dsmixer.config.outline import short_layer_name
from dsmixer.report.colors import INK, MUTED
from dsmixer.report.figures import by_layer
from dsmixer.report.gains import gain_map, gain_title
from dsmixer.report.plots import CYCLE, draw_heat_map, look, name_places
from dsmixer.report.run_folder import RoutingLoad, read_run
from dsmixer.report.scores import scores_of

MAX_ROWS = 16  # domains of the matrix
MAX_LINES = 8  # domains that get a line and a colour of their own


def result_picture(run_folder: Path, path_png: Path) -> Path:
    """Draw the result of an evaluated run.

    Left, held-out loss below the base for every expert on every domain, and for the uniform mixture and the
    mixture; right, the share of tokens that put their own expert first, by layer.

    Raises:
        UserError: no run folder, or one without an evaluation or without ``routing.json``.
    """
    run = read_run(run_folder)
    scores = scores_of(run.evaluation, run.config)
    heat_map = gain_map(scores, MAX_ROWS)
    fix = "evaluate the run first"
    if heat_map is None:
        raise UserError(
            "no losses of base and experts to draw", where=f"{run_folder}/evaluation.json", fix=fix
        )
    if run.routing is None or not np.isfinite(run.routing.own_first).any():
        raise UserError("no routing of held-out data to draw", where=f"{run_folder}/routing.json", fix=fix)
    num_rows, num_columns = heat_map.values.shape
    left_width = 3.0 + 0.56 * num_columns
    with look():
        figure = Figure(figsize=(left_width + 5.0, max(3.6, 1.6 + 0.34 * num_rows)), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr,call-arg]
        left, right = figure.subplots(1, 2, width_ratios=[left_width, 4.6])
        draw_heat_map(left, heat_map)
        left.set_title(gain_title(scores, heat_map), fontsize=11, pad=10)
        left.set(xlabel="expert alone, and mixtures", ylabel="domain")
        _draw_layers(right, run.routing)
        path_png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path_png, dpi=150, format="png")
    return path_png


def _draw_layers(axes: Axes, routing: RoutingLoad) -> None:
    layers, own_LG = by_layer(routing, routing.own_first)
    x = np.arange(len(layers))
    lines = [index for index in range(own_LG.shape[1]) if np.isfinite(own_LG[:, index]).any()]
    few = len(lines) <= MAX_LINES
    for number, index in enumerate(lines):
        color = CYCLE[number] if few else "#b9c3d2"
        label = routing.domains[index] if few else None
        marker = "o" if len(layers) <= 12 else None
        axes.plot(x, own_LG[:, index], color=color, linewidth=1.2, marker=marker, markersize=3.5, label=label)
    axes.plot(x, np.nanmean(own_LG[:, lines], axis=1), color=INK, linewidth=2.6, label="mean of domains")
    chance = 1 / len(routing.experts) if routing.experts else math.nan
    axes.axhline(
        chance, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, label=f"chance, 1/{len(routing.experts)}"
    )
    ticks = x if len(layers) <= 16 else x[:: math.ceil(len(layers) / 12)]
    name_places(axes, ticks, [short_layer_name(layers[index]) for index in ticks])
    axes.set(ylim=(0, 1.02), xlabel="layer", ylabel="share of held-out tokens")
    axes.set_yticks(np.linspace(0, 1, 6), [f"{share:.0%}" for share in np.linspace(0, 1, 6)])
    axes.grid(axis="y")
    axes.set_title("Tokens that put their own expert first", fontsize=11, pad=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
