"""The figures of a run: its curves, where its tokens went, and what each expert is worth on each domain."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from dsmixer.report.limits import MAX_SHOWN, evenly, largest, shown, with_remarks
from dsmixer.report.plots import GAIN, Curve, HeatMap, heat_figure, line_figure
from dsmixer.report.run_folder import RoutingLoad, RunFolder
from dsmixer.report.scores import EXPERT, OWN, Scores

MAX_WRITTEN = 16  # columns up to which the cells of a matrix carry their numbers


def curve_figures(run: RunFolder) -> Iterator[tuple[str, Figure]]:
    """What a metric did over the steps: pairs of a caption and a figure, for each that was logged."""
    for stage in sorted(run.metrics):
        caption = f"Stage {'one' if stage == 1 else 'two'}: loss"
        parts = [("loss", "loss")] if stage == 1 else [("loss", "loss"), ("task_loss", "task loss alone")]
        curves = [_curve(run, stage, key, label, noisy=True) for key, label in parts]
        yield from _lines(caption, "nats a target token", curves)
    entropy = _curve(run, 2, "routing_entropy", "token entropy")
    yield from _lines("Routers: entropy of a token beside ln E", "nats", [entropy, _entropy_limit(run)])
    load = _curve(run, 2, "load_variance", "load variance", noisy=True)
    yield from _lines("Routers: variance of the load over experts", "variance of E·f", [load])
    probability = _curve(run, 2, "p_variance", "Var(p)")
    yield from _lines("Routers: Var(p) over experts", "variance of p", [probability])
    own = _curve(run, 2, "own_expert_share", "own expert first")
    yield from _lines("Routers: tokens whose own expert is first", "share of tokens", [own])


def _curve(run: RunFolder, stage: int, key: str, label: str, *, noisy: bool = False) -> Curve:
    steps, values = run.series(stage, key)
    return Curve(label, steps, values, noisy=noisy)


def _entropy_limit(run: RunFolder) -> Curve:
    steps, values = run.series(2, "entropy_limit")
    return Curve("ln E, the most there can be", steps, values, limit=True)


def _lines(caption: str, unit: str, curves: list[Curve]) -> Iterator[tuple[str, Figure]]:
    present = [curve for curve in curves if np.isfinite(curve.y).any()]
    if present and not all(curve.limit for curve in present):
        yield caption, line_figure(present, title=caption, unit=unit)


def routing_figures(routing: RoutingLoad) -> Iterator[tuple[str, Figure]]:
    """Heat maps of held-out tokens' first experts, by domain and by layer, and of the own expert's share."""
    if not routing.load.size:
        return
    load_GE = _mean(routing.load, 0)
    domains, experts = evenly(len(routing.domains)), evenly(len(routing.experts))
    domain_remark = shown("domains", "evenly picked", len(domains), len(routing.domains))
    expert_names = [routing.experts[index] for index in experts]
    domain_names = [routing.domains[index] for index in domains]
    title = with_remarks(
        "First expert of a token, by domain",
        domain_remark,
        shown("experts", "evenly picked", len(experts), len(routing.experts)),
    )
    values = load_GE[np.ix_(domains, experts)]
    yield title, _share_figure(title, values, domain_names, expert_names)

    names, load_LE = by_layer(routing, _mean(routing.load, 1))
    layers, experts = evenly(len(names)), largest(_mean(load_LE, 0))
    layer_remark = shown("layers", "evenly picked", len(layers), len(names))
    title = with_remarks(
        "First expert of a token, by layer",
        layer_remark,
        shown("experts", "largest", len(experts), len(routing.experts)),
    )
    values, layer_names = load_LE[np.ix_(layers, experts)], [names[index] for index in layers]
    yield title, _share_figure(title, values, layer_names, [routing.experts[index] for index in experts])

    if np.isfinite(routing.own_first).any():
        own_LG = by_layer(routing, routing.own_first)[1]
        title = with_remarks("Own expert first, by layer and domain", layer_remark, domain_remark)
        yield title, _share_figure(title, own_LG[np.ix_(layers, domains)], layer_names, domain_names)


def _share_figure(title: str, values: np.ndarray, rows: list[str], columns: list[str]) -> Figure:
    texts = None
    if len(columns) <= MAX_WRITTEN:
        texts = [["" if math.isnan(value) else f"{100 * value:.0f}" for value in row] for row in values]
    heat_map = HeatMap(values, rows, columns, 0, 1, "share of tokens", texts, percent=True)
    return heat_figure(heat_map, title=title)


def layer_of(router: str) -> str:
    """The layer a router belongs to, by the first number in its module path; the path where it has none.

    An encoder-decoder model has layers of each number on both sides.
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", router)
    side = re.match(r"(encoder|decoder)\.", router)
    return f"{side.group(1) + ' ' if side else ''}layer {found.group(1)}" if found else router


def by_layer(routing: RoutingLoad, values_M: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Mean of ``values_M [M, ...]`` over the routers of each layer: L names and ``[L, ...]``."""
    layers: dict[str, list[int]] = {}
    for index, router in enumerate(routing.routers):
        layers.setdefault(layer_of(router), []).append(index)
    return list(layers), np.stack([_mean(values_M[indices], 0) for indices in layers.values()])


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over what is a number; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of a mean over nothing
        return np.asarray(np.nanmean(values, axis=axis))


def gain_map(scores: Scores, max_rows: int = MAX_SHOWN) -> HeatMap | None:
    """What each expert, the uniform mixture and the mixture (columns) gain on the domains (rows).

    A cell holds the nats a target token below the base; its colour is that gain as a share of the own
    expert's, so that domains whose losses differ in size can be compared. Where only each domain's own expert
    was measured, one column stands for all of them. None where there is nothing to compare. At most
    ``max_rows`` domains are in it, evenly picked.
    """
    measured = [domain for domain in scores.domains if not math.isnan(scores.gain(domain, OWN))]
    if not measured:
        return None
    experts = [f"{EXPERT}{name}" for name in scores.experts]
    crossed = all(not math.isnan(scores.gain(domain, method)) for domain in measured for method in experts)
    columns = experts if crossed and len(experts) <= MAX_WRITTEN else [OWN]
    mixed = [method for method in ("uniform", "mixture") if method in scores.methods("loss")]
    domains = [measured[index] for index in evenly(len(measured), max_rows)]
    methods = columns + mixed
    gains = np.array([[scores.gain(domain, method) for method in methods] for domain in domains])
    shares = np.array(
        [[scores.share_of_own_gain(domain, method) for method in methods] for domain in domains]
    )
    texts = [["" if math.isnan(value) else f"{value:+.2f}" for value in row] for row in gains]
    unit = "share of the own expert's gain"
    names = [method.removeprefix(EXPERT) for method in methods]
    gap = len(columns) if mixed else None
    return HeatMap(shares, domains, names, -1, 1, unit, texts, GAIN, gap, percent=True)


def gain_figure(scores: Scores) -> Figure | None:
    """:func:`gain_map` as a figure of the page."""
    heat_map = gain_map(scores)
    if heat_map is None:
        return None
    return heat_figure(heat_map, title=gain_title(scores, heat_map))


def gain_title(scores: Scores, heat_map: HeatMap) -> str:
    """Title of :func:`gain_map`, with how many of the domains are in it."""
    total = sum(not math.isnan(scores.gain(domain, OWN)) for domain in scores.domains)
    remark = shown("domains", "evenly picked", len(heat_map.rows), total)
    return with_remarks("Held-out loss below the base, nats a token", remark)
