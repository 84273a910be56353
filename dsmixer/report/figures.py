"""Where held-out tokens went: heat maps and lines by domain and by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from dsmixer.config.outline import layer_name, short_layer_name
from dsmixer.report.limits import MAX_WRITTEN, evenly, largest, shown, with_remarks
from dsmixer.report.plots import Curve, HeatMap, heat_figure, line_figure
from dsmixer.report.run_folder import RoutingLoad, mean_of


def routing_figures(routing: RoutingLoad) -> Iterator[tuple[str, Figure]]:
    """Captions and figures of what the routers did with held-out tokens: by domain first, then by layer.

    First choices by domain and expert and by layer and expert; token entropy by layer; how often the own
    expert came first and how likely it was, by layer and domain. What a run does not know is left out.
    """
    if not routing.routers:
        return
    if np.isfinite(routing.load).any():
        yield _load_by_domain(routing)
    if np.isfinite(routing.expert_load).any():
        yield _load_by_layer(routing)
    if np.isfinite(routing.entropy).any():
        yield _entropy(routing)
    if np.isfinite(routing.own_probability).any():
        yield _by_layer_and_domain(
            routing, routing.own_probability, "Probability of the own expert", "mean p of the own expert"
        )
    if np.isfinite(routing.own_first).any():
        yield _by_layer_and_domain(routing, routing.own_first, "Own expert first", "share of tokens")


def _load_by_domain(routing: RoutingLoad) -> tuple[str, Figure]:
    load_GE, domains = mean_of(routing.load, 0), evenly(len(routing.domains))
    experts = largest(mean_of(load_GE[domains], 0))
    title = with_remarks(
        "First expert of a token, by domain",
        shown("domains", "evenly picked", len(domains), len(routing.domains)),
        shown("experts", "largest", len(experts), len(routing.experts)),
    )
    values = load_GE[np.ix_(domains, experts)]
    names = [routing.domains[index] for index in domains], [routing.experts[index] for index in experts]
    return title, share_figure(title, values, *names)


def _load_by_layer(routing: RoutingLoad) -> tuple[str, Figure]:
    names, load_LE = by_layer(routing, routing.expert_load)
    layers, experts = evenly(len(names)), largest(mean_of(load_LE, 0))
    title = with_remarks(
        "First expert of a token, by layer",
        shown("layers", "evenly picked", len(layers), len(names)),
        shown("experts", "largest", len(experts), len(routing.experts)),
    )
    values, layer_names = load_LE[np.ix_(layers, experts)], [names[index] for index in layers]
    return title, share_figure(title, values, layer_names, [routing.experts[index] for index in experts])


def _entropy(routing: RoutingLoad) -> tuple[str, Figure]:
    title = "Entropy of a token, by layer, beside ln E"
    names, entropy_L = by_layer(routing, routing.entropy)
    return title, entropy_figure(title, names, entropy_L, len(routing.experts))


def entropy_figure(title: str, layers: list[str], entropy_L: np.ndarray, num_experts: int) -> Figure:
    """A line of the layers' mean token entropy, under the line of ``ln E``."""
    x = np.arange(len(layers), dtype=float)
    most = math.log(num_experts)
    limit = Curve(f"ln E = ln {num_experts} = {most:.2f}", x, np.full(len(x), most), limit=True)
    curves = [Curve("mean token entropy", x, entropy_L, marked=True), limit]
    short = [short_layer_name(name) for name in layers]
    return line_figure(curves, title=title, unit="nats", x_label="layer", x_names=short, y_from=0.0)


def _by_layer_and_domain(
    routing: RoutingLoad, values_MG: np.ndarray, title: str, unit: str
) -> tuple[str, Figure]:
    names, values_LG = by_layer(routing, values_MG)
    known = [index for index in range(len(routing.domains)) if np.isfinite(values_LG[:, index]).any()]
    layers, domains = evenly(len(names)), [known[index] for index in evenly(len(known))]
    title = with_remarks(
        f"{title}, by layer and domain",
        shown("layers", "evenly picked", len(layers), len(names)),
        shown("domains", "evenly picked", len(domains), len(known)),
    )
    values, layer_names = values_LG[np.ix_(layers, domains)], [names[index] for index in layers]
    domain_names = [routing.domains[index] for index in domains]
    return title, share_figure(title, values, layer_names, domain_names, unit)


def share_figure(
    title: str, values: np.ndarray, rows: list[str], columns: list[str], unit: str = "share of tokens"
) -> Figure:
    """A heat map of numbers from 0 to 1, written in its cells in percent where there is room."""
    texts = None
    if len(columns) <= MAX_WRITTEN:
        texts = [["" if math.isnan(value) else f"{100 * value:.0f}" for value in row] for row in values]
    heat_map = HeatMap(values, rows, columns, 0, 1, unit, texts, percent=True)
    return heat_figure(heat_map, title=title)


def by_layer(routing: RoutingLoad, values_M: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Mean of ``values_M [M, ...]`` over the routers of each layer: L names and ``[L, ...]``."""
    return mean_by_layer(routing.routers, values_M)


def mean_by_layer(routers: Sequence[str], values_M: np.ndarray) -> tuple[list[str], np.ndarray]:
    """As :func:`by_layer`, for routers of these module paths."""
    layers: dict[str, list[int]] = {}
    for index, router in enumerate(routers):
        layers.setdefault(layer_name(router), []).append(index)
    return list(layers), np.stack([mean_of(values_M[indices], 0) for indices in layers.values()])
