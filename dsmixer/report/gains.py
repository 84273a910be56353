"""What each expert is worth on each domain, beside the mixtures of them."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from dsmixer.report.limits import MAX_SHOWN, MAX_WRITTEN, evenly, shown, with_remarks
from dsmixer.report.plots import GAIN, HeatMap, heat_figure
from dsmixer.report.scores import EXPERT, OWN, Scores


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
