"""What every method reached on every domain, and what each expert is worth on each."""

from __future__ import annotations

import math

import numpy as np

from dsmixer.report.frames import figures, note, section, table
from dsmixer.report.gains import gain_figure
from dsmixer.report.html import Markup, join, tag
from dsmixer.report.limits import evenly
from dsmixer.report.scores import Scores, lower_is_better
from dsmixer.report.text import MISSING, percent, readable

MAX_ROWS = 60  # domains of a table: of more, those that the mixture serves worst and best
SHARES = ("accuracy", "accuracy_norm", "exact_match")
TITLES = {
    "loss": "Held-out loss, nats a target token",
    "accuracy": "Accuracy, by log-likelihood",
    "accuracy_norm": "Accuracy, by log-likelihood a byte",
    "exact_match": "Exact match of generated answers",
}


def evaluation(scores: Scores) -> Markup:
    """A table of domains and methods for each metric, and the matrix of experts and domains."""
    if not scores.values:
        return section("Evaluation", note("This run was not evaluated."), key="evaluation")
    tables = [
        join(tag("h3", TITLES.get(metric, metric)), *_metric_table(scores, metric))
        for metric in scores.metrics
    ]
    parts = [note("On held-out data. The best of a row is marked."), *tables]
    figure = gain_figure(scores)
    if figure is not None:
        remark = (
            "Each cell: nats a target token that a method's held-out loss lies below the base's. "
            "Colour: the same as a share of what the domain's own expert gains."
        )
        pictures = figures("gain", [("What each expert is worth on each domain", figure)])
        parts += [tag("h3", "Experts on domains"), note(remark), pictures]
    return section("Evaluation", *parts, key="evaluation")


def _metric_table(scores: Scores, metric: str) -> list[Markup]:
    methods = scores.methods(metric)
    domains = [domain for domain in scores.domains if (domain, metric) in scores.num_examples]
    recovered = metric == "loss" and "mixture" in methods
    titles = ["domain", *methods, *(["recovered"] if recovered else []), "examples"]
    shown, which = _shown_domains(scores, domains, metric, recovered)
    rows = [_metric_row(scores, domain, metric, methods, recovered) for domain in shown]
    if len(domains) > 1:
        rows.append(_mean_row(scores, domains, metric, methods, recovered))
    left = len(domains) - len(shown)
    remark = (
        f"Of {len(domains)} domains {which}; {left} between them are in evaluation.json, and in the mean."
    )
    return [table(titles, rows), *([note(remark)] if left else [])]


def _shown_domains(scores: Scores, domains: list[str], metric: str, recovered: bool) -> tuple[list[str], str]:
    """Domains of the table, and of many, which they are: both ends of their order by what the mixture
    reached, or some evenly picked where it was not scored.
    """
    if len(domains) <= MAX_ROWS:
        return domains, ""
    merits = _merits(scores, domains, metric, recovered)
    known = sorted((domain for domain in domains if not math.isnan(merits[domain])), key=merits.__getitem__)
    if len(known) < MAX_ROWS:
        return [domains[index] for index in evenly(len(domains), MAX_ROWS)], f"{MAX_ROWS} evenly picked"
    half = MAX_ROWS // 2
    which = f"the {half} that the mixture serves worst and the {half} that it serves best"
    return known[:half] + known[-half:], which


def _merits(scores: Scores, domains: list[str], metric: str, recovered: bool) -> dict[str, float]:
    """How well the mixture serves each domain: the share recovered where that is known, else the metric."""
    shares = {domain: scores.share_of_own_gain(domain, "mixture") for domain in domains}
    if recovered and not all(map(math.isnan, shares.values())):
        return shares
    sign = -1 if lower_is_better(metric) else 1
    return {domain: sign * scores.value(domain, "mixture", metric) for domain in domains}


def _metric_row(scores: Scores, domain: str, metric: str, methods: list[str], recovered: bool) -> Markup:
    values = [scores.value(domain, method, metric) for method in methods]
    cells = [tag("th", domain, scope="row"), *_value_cells(values, metric)]
    if recovered:
        cells.append(tag("td", percent(scores.share_of_own_gain(domain, "mixture")), class_="number"))
    cells.append(tag("td", readable(scores.num_examples[domain, metric]), class_="number"))
    return tag("tr", *cells)


def _mean_row(scores: Scores, domains: list[str], metric: str, methods: list[str], recovered: bool) -> Markup:
    cells = [
        tag("th", "mean", scope="row"),
        *_value_cells([scores.mean(method, metric) for method in methods], metric),
    ]
    if recovered:
        shares = [scores.share_of_own_gain(domain, "mixture") for domain in domains]
        known = [share for share in shares if not math.isnan(share)]
        cells.append(tag("td", percent(float(np.mean(known)) if known else math.nan), class_="number"))
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
    return percent(value) if metric in SHARES else f"{value:.4f}"
