"""The parts of the page, in the order a reader meets them. A part that has nothing to say is empty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsmixer.report.figures import by_layer, curve_figures, gain_figure, routing_figures
from dsmixer.report.html import Markup, inline_svg, join, tag
from dsmixer.report.plots import as_svg
from dsmixer.report.run_folder import RoutingLoad, RunFolder, numbers
from dsmixer.report.scores import Scores, lower_is_better
from dsmixer.report.text import MISSING, readable

MAX_PLAN_LINES = 60
LONG_ROWS = 40  # a table with more scrolls in its frame, on a screen
WIDE_INCHES = 5.5  # a figure wider than this gets the whole width of the page


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
        yield (
            _percent(float(np.mean(list(known.values())))),
            "of the own expert's gain recovered, mean of domains",
        )
        yield _percent(known[worst]), f"recovered where it is least ({worst})"
    pairs = [
        tuple(scores.value(domain, method, "loss") for method in ("mixture", "uniform"))
        for domain in scores.domains
    ]
    pairs = [pair for pair in pairs if not any(math.isnan(value) for value in pair)]
    if pairs:
        better = sum(mixture < uniform for mixture, uniform in pairs)
        yield f"{better} of {len(pairs)}", "domains where the mixture beats the uniform mixture"
    if run.routing is not None:
        share, where = own_first_after_first_layer(run.routing)
        if not math.isnan(share):
            yield _percent(share), f"of tokens put their own expert first, mean of domains and {where}"


def own_first_after_first_layer(routing: RoutingLoad) -> tuple[float, str]:
    """Share of tokens whose own expert is first, leaving out the first layer, and what it is a mean of."""
    if not np.isfinite(routing.own_first).any():
        return math.nan, ""
    layers, own_LG = by_layer(routing, routing.own_first)
    if len(layers) == 1:
        return float(np.nanmean(own_LG)), "the one layer"
    return float(np.nanmean(own_LG[1:])), "layers after the first"


def trained(run: RunFolder) -> Markup:
    """What was trained, from the settings."""
    entries = [(name, value) for name, value in _settings(run) if value not in (None, "")]
    lines = [join(tag("dt", name), tag("dd", value)) for name, value in entries]
    return _section("What was trained", tag("div", tag("dl", *lines), class_="card"), _stage_table(run))


def _settings(run: RunFolder) -> Iterator[tuple[str, object]]:
    get = run.setting
    yield "Base model", " ".join(str(part) for part in (get("base.model"), get("base.revision")) if part)
    yield (
        "Precision",
        ", ".join(str(part) for part in (get("base.dtype"), _named(run, "base.quantization")) if part),
    )
    yield "Domains", _names(_entries(run, "data.domains"))
    experts = _entries(run, "mixer.experts")
    yield "Experts", _names(experts) if experts else "one a domain"
    targets = get("mixer.targets")
    yield "Projections", ", ".join(map(str, targets)) if isinstance(targets, list) else targets
    yield "Rank, alpha, dropout", _listed(run, "mixer.rank", "mixer.alpha", "mixer.dropout")
    yield "Routers", str(get("mixer.router") or "").replace("_", " ")
    if get("stage2.enabled") is not False:
        yield "Routing", _listed(run, "stage2.routing", "stage2.top_k")
        yield "Experts in stage two", get("stage2.experts")
        yield "RSL", _listed(run, "stage2.rsl.entropy", "stage2.rsl.alpha", "stage2.rsl.entropy_weight")
    yield "Row length, packing", _listed(run, "data.max_length", "data.packing")
    yield "Placement, ZeRO stage", _listed(run, "placement.mode", "deepspeed.zero_stage")
    yield "Seed", get("run.seed")


def _entries(run: RunFolder, key: str) -> list[str]:
    value = run.setting(key)
    entries = value if isinstance(value, list) else []
    return [str(entry["name"]) for entry in entries if isinstance(entry, Mapping) and "name" in entry]


def _names(names: Sequence[str], limit: int = 24) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)}: {', '.join(names[:limit])}{more}" if names else ""


def _named(run: RunFolder, key: str) -> Any:
    value = run.setting(key)
    return None if value == "none" else value


def _listed(run: RunFolder, *keys: str) -> str:
    return ", ".join(readable(run.setting(key)) for key in keys if run.setting(key) is not None)


def _stage_table(run: RunFolder) -> Markup:
    rows = [_stage_row(run, stage) for stage in sorted(run.metrics)]
    if not rows:
        return tag("p", "No step was logged.", class_="note")
    columns = list(rows[0])
    head = tag("tr", *(tag("th", column, class_=_side(column != "Stage")) for column in columns))
    body = [
        tag("tr", *(tag("td", readable(row[column]), class_=_side(column != "Stage")) for column in columns))
        for row in rows
    ]
    table = tag("table", tag("thead", head), tag("tbody", *body))
    return join(tag("h3", "Steps"), tag("div", table, class_="card"))


def _stage_row(run: RunFolder, stage: int) -> dict[str, object]:
    rows = run.metrics[stage]
    losses, speeds, norms = (numbers(rows, key) for key in ("loss", "tokens_per_second", "grad_norm"))
    tenth = max(1, len(losses) // 10)
    return {
        "Stage": "one: experts" if stage == 1 else "two: routers",
        "Steps": rows[-1]["step"],
        "Loss, first tenth": float(losses[:tenth].mean()) if losses.size else None,
        "Loss, last tenth": float(losses[-tenth:].mean()) if losses.size else None,
        "Peak learning rate": run.setting(f"stage{stage}.learning_rate"),
        "Median gradient norm": float(np.median(norms)) if norms.size else None,
        "Median tokens/s": float(np.median(speeds)) if speeds.size else None,
    }


def curves(run: RunFolder) -> Markup:
    """Loss of both stages, and what the routers did."""
    return _section("Training", _figures("curve", curve_figures(run)))


def evaluation(scores: Scores) -> Markup:
    """A table of domains and methods for each metric, and the matrix of experts and domains."""
    if not scores.values:
        return _section("Evaluation", tag("p", "This run was not evaluated.", class_="note"))
    tables = [join(tag("h3", _title(metric)), _metric_table(scores, metric)) for metric in scores.metrics]
    parts = [tag("p", "On held-out data. The best of a row is marked.", class_="note"), *tables]
    figure = gain_figure(scores)
    if figure is not None:
        note = (
            "Each cell: nats a target token that a method's held-out loss lies below the base's. "
            "Colour: the same as a share of what the domain's own expert gains."
        )
        pictures = _figures("gain", [("What each expert is worth on each domain", figure)])
        parts += [tag("h3", "Experts on domains"), tag("p", note, class_="note"), pictures]
    return _section("Evaluation", *parts)


def _title(metric: str) -> str:
    known = {
        "loss": "Held-out loss, nats a target token",
        "accuracy": "Accuracy, by log-likelihood",
        "accuracy_norm": "Accuracy, by log-likelihood a byte",
        "exact_match": "Exact match of generated answers",
    }
    return known.get(metric, metric)


def _metric_table(scores: Scores, metric: str) -> Markup:
    methods = scores.methods(metric)
    domains = [domain for domain in scores.domains if (domain, metric) in scores.num_examples]
    recovered = metric == "loss" and "mixture" in methods
    titles = [*methods, *(["recovered"] if recovered else []), "examples"]
    head = tag("tr", tag("th", "domain"), *(tag("th", title, class_="number") for title in titles))
    rows = [_metric_row(scores, domain, metric, methods, recovered) for domain in domains]
    if len(domains) > 1:
        rows.append(_mean_row(scores, domains, metric, methods, recovered))
    frame = "card long" if len(rows) > LONG_ROWS else "card"
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_=frame)


def _metric_row(scores: Scores, domain: str, metric: str, methods: list[str], recovered: bool) -> Markup:
    values = [scores.value(domain, method, metric) for method in methods]
    cells = [tag("th", domain, scope="row"), *_value_cells(values, metric)]
    if recovered:
        cells.append(tag("td", _percent(scores.share_of_own_gain(domain, "mixture")), class_="number"))
    cells.append(tag("td", readable(scores.num_examples[domain, metric]), class_="number"))
    return tag("tr", *cells)


def _mean_row(scores: Scores, domains: list[str], metric: str, methods: list[str], recovered: bool) -> Markup:
    cells = [
        tag("th", "mean", scope="row"),
        *_value_cells([scores.mean(method, metric) for method in methods], metric),
    ]
    if recovered:
        shares = [scores.share_of_own_gain(domain, "mixture") for domain in domains]
        cells.append(tag("td", _percent(float(np.mean(shares))), class_="number"))
    total = sum(scores.num_examples[domain, metric] for domain in domains)
    cells.append(tag("td", readable(total), class_="number"))
    return tag("tr", *cells, class_="mean")


def _value_cells(values: list[float], metric: str) -> list[Markup]:
    known = [value for value in values if not math.isnan(value)]
    best = (min(known) if lower_is_better(metric) else max(known)) if len(known) > 1 else None
    return [
        tag("td", _score(value, metric), class_="number best" if value == best else "number")
        for value in values
    ]


def _score(value: float, metric: str) -> str:
    if math.isnan(value):
        return MISSING
    is_share = metric in ("accuracy", "accuracy_norm", "exact_match")
    return f"{100 * value:.1f} %" if is_share else f"{value:.4f}"


def _percent(share: float) -> str:
    return MISSING if math.isnan(share) else f"{100 * share:.1f} %"


def routing(run: RunFolder) -> Markup:
    """Where the tokens of held-out data went."""
    if run.routing is None or not run.routing.load.size:
        return Markup("")
    note = "The expert a router puts first, for the tokens of held-out data; mean over the routers of a cell."
    return _section(
        "Routing", tag("p", note, class_="note"), _figures("routing", routing_figures(run.routing))
    )


def plan(run: RunFolder) -> Markup:
    """The placement plan's figures."""
    lines = list(_flat(run.plan))
    if not lines:
        return Markup("")
    entries = [join(tag("dt", key), tag("dd", readable(value))) for key, value in lines[:MAX_PLAN_LINES]]
    left = len(lines) - len(entries)
    remark = tag("p", f"{left} more in plan.json", class_="note") if left > 0 else ""
    return _section("Placement plan", tag("div", tag("dl", *entries), class_="card"), remark)


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, object]]:
    for key, item in value.items():
        name = f"{above}{str(key).replace('_', ' ')}"
        if isinstance(item, Mapping):
            yield from _flat(item, f"{name}: ")
        elif isinstance(item, list):
            yield name, ", ".join(map(str, item)) if len(item) <= 12 else f"{len(item)} entries"
        else:
            yield name, item


def _figures(key: str, pairs: Iterator[tuple[str, Figure]] | list[tuple[str, Figure]]) -> Markup:
    figures = []
    for index, (caption, figure) in enumerate(pairs):
        width = float(figure.get_figwidth())
        svg = inline_svg(as_svg(figure), f"{key}{index}", caption)
        framed = tag(
            "div", svg, style=f"max-width:{width * 1.35:.1f}in;min-width:{width * 0.66:.1f}in;margin:0 auto"
        )
        figures.append(tag("figure", framed, class_="wide" if width > WIDE_INCHES else None))
    return tag("div", *figures, class_="figures") if figures else Markup("")


def _section(title: str, *parts: object) -> Markup:
    content = join(*parts)
    return tag("section", tag("h2", title), content) if content else Markup("")


def _side(is_number: bool) -> str | None:
    return "number" if is_number else None
