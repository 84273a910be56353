"""The result of a run in a few tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from dsmixer.report.html import Markup, tag
from dsmixer.report.run_folder import RunFolder
from dsmixer.report.scores import Scores
from dsmixer.report.text import percent


def headline(run: RunFolder, scores: Scores) -> Markup:
    """The result in a few tiles."""
    tiles = [
        tag("div", tag("b", figure), tag("span", what), class_="tile") for figure, what in _tiles(run, scores)
    ]
    return tag("div", *tiles, class_="tiles") if tiles else Markup("")


def _tiles(run: RunFolder, scores: Scores) -> Iterator[tuple[str, str]]:
    shares = {domain: scores.share_of_own_gain(domain, "mixture") for domain in scores.domains}
    known = {domain: share for domain, share in shares.items() if not math.isnan(share)}
    if known:
        worst = min(known, key=lambda domain: known[domain])
        mean = float(np.mean(list(known.values())))
        of = "domains" if len(known) == len(shares) else f"the {len(known)} domains whose own expert gains"
        yield percent(mean), f"of the own expert's gain recovered, mean of {of}"
        yield percent(known[worst]), f"recovered where it is least ({worst})"
    pairs = [
        tuple(scores.value(domain, method, "loss") for method in ("mixture", "uniform"))
        for domain in scores.domains
    ]
    pairs = [pair for pair in pairs if not any(math.isnan(value) for value in pair)]
    if pairs:
        better = sum(mixture < uniform for mixture, uniform in pairs)
        yield f"{better} of {len(pairs)}", "domains where the mixture beats the uniform mixture"
    if run.routing is not None:
        kinds = {"own_first_later_layers_mean": "layers after the first", "own_first_mean": "routers"}
        found = next((key for key in kinds if key in run.routing.summary), None)
        if found is not None:
            share, where = run.routing.summary[found], kinds[found]
            yield percent(share), f"of tokens put their own expert first, mean of domains and {where}"
