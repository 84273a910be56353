"""What the metrics of a run did over its steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from dsmixer.report.plots import Curve, line_figure, running_mean
from dsmixer.report.routing_terms import ENTROPY, routing_terms
from dsmixer.report.run_folder import RunFolder

MOST_LINES = 8  # experts that get a line of their own: as many as there are colours


def curve_figures(run: RunFolder) -> Iterator[tuple[str, Figure]]:
    """Losses and gradient norms: pairs of a caption and a figure, for each that was logged."""
    for stage in sorted(run.metrics):
        name = f"Stage {'one' if stage == 1 else 'two'}"
        parts = [("loss", "loss")] if stage == 1 else [("loss", "loss"), ("task_loss", "task loss alone")]
        curves = [_curve(run, stage, key, label, noisy=True) for key, label in parts]
        yield from _lines(f"{name}: loss", "nats a target token", curves)
        norm = _curve(run, stage, "grad_norm", "gradient norm", noisy=True)
        yield from _lines(f"{name}: gradient norm before clipping", "norm", [norm])


def balance_figures(run: RunFolder) -> Iterator[tuple[str, Figure]]:
    """The routing loss with its terms, and what it acts on: entropy, load, specialisation."""
    terms = routing_terms(run)
    if terms:
        curves = [Curve(label, *values, noisy=label != ENTROPY) for label, values in terms.items()]
        yield from _lines("Routing loss and its terms", "nats, mean over routers", curves)
    else:
        curves = [_curve(run, 2, "rsl", "routing loss", noisy=True)]
        yield from _lines("Routing loss", "mean over routers", curves)
    entropy = _curve(run, 2, "routing_entropy", "token entropy")
    yield from _lines("Routers: entropy of a token beside ln E", "nats", [entropy, _entropy_limit(run)])
    load = _curve(run, 2, "load_variance", "load variance", noisy=True)
    yield from _lines("Routers: variance of the load over experts", "variance of E·f", [load])
    yield from _lines("Routers: load of the experts, smoothed", "E·f, 1 is even", _loads(run))
    probability = _curve(run, 2, "p_variance", "Var(p)")
    yield from _lines("Routers: Var(p) over experts", "variance of p", [probability])
    own = _curve(run, 2, "own_expert_share", "own expert first")
    yield from _lines("Routers: tokens whose own expert is first", "share of tokens", [own])


def _loads(run: RunFolder) -> list[Curve]:
    """Of each expert where they are few; of the most and the least loaded else."""
    rows = run.metrics.get(2, [])
    names = [key.removeprefix("load/") for key in (rows[-1] if rows else ()) if key.startswith("load/")]
    if not 0 < len(names) <= MOST_LINES:
        pairs = [("load_max", "most loaded expert"), ("load_min", "least loaded expert")]
        return [_curve(run, 2, key, label, noisy=True) for key, label in pairs]
    curves = [_curve(run, 2, f"load/{name}", name) for name in names]
    # smooth alone: the noise of several lines is a thicket
    return [replace(curve, y=running_mean(curve.y, max(3, len(curve.y) // 20))) for curve in curves]


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
