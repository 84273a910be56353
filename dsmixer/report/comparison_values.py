"""The figures of a comparison as text: titles, units, and a mean with its spread.

``results`` everywhere is what ``results.json`` of a comparison holds.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from dsmixer.report.scores import lower_is_better
from dsmixer.report.text import MISSING

Results = Mapping[str, Any]
Figure = Mapping[str, Any]

SHARES = ("recovered", "accuracy", "accuracy_norm", "exact_match", "acc", "acc_norm", "pass@1", "own_first")
METRIC_TITLES = {
    "loss": "Held-out loss, nats a target token",
    "recovered": "Share of the own expert's gain recovered, %",
    "accuracy": "Accuracy by log-likelihood of the choice, %",
    "accuracy_norm": "Accuracy by log-likelihood a byte of the choice, %",
    "exact_match": "Exact match of written answers, %",
    "acc": "acc of lm-evaluation-harness, %",
    "acc_norm": "acc_norm of lm-evaluation-harness, %",
    "pass@1": "pass@1 of written programs, %",
}
MEASURE_TITLES = {
    "routing_entropy": "routing entropy, nats (bits)",
    "load_variance": "load variance",
    "own_first": "own expert first, %",
    "seconds": "seconds of training",
    "seconds_per_step": "seconds a step",
    "seconds_per_example": "milliseconds an answer",
    "tokens_per_second": "tokens a second",
    "trainable": "trained weights",
    "peak_memory": "peak memory, GB",
}
MEASURE_NOTES = {
    "routing_entropy": "Routing entropy: of a held-out token's probabilities, mean over routers.",
    "load_variance": "Load variance: variance over experts of E·f, the mean of the last tenth of the steps.",
    "own_first": "Own expert first: share of held-out tokens, mean of domains, layers after the first.",
    "seconds": "Seconds: in optimizer steps; of another method, until it is ready to answer.",
    "seconds_per_step": "Seconds a step, tokens a second: medians of the last stage.",
    "seconds_per_example": "Milliseconds an answer: of scoring a held-out example with its choices, batched.",
    "trainable": "Trained weights: of the row's own training; an own expert's are those of all experts.",
    "peak_memory": "Peak memory: 10⁹ bytes, resident in the process where the steps logged none of a device.",
}
NATS_A_BIT = math.log(2.0)
COMPETING = ("variant", "method")


def metric_title(metric: str) -> str:
    """What a metric is called above its table."""
    return METRIC_TITLES.get(metric, metric)


def better(metric: str) -> str:
    """Whether lower or higher is better, in words."""
    return "lower is better" if lower_is_better(metric) else "higher is better"


def scaled(name: str, value: float) -> float:
    """A value in the unit it is shown in: shares in percent, bytes in 10^9, answers in milliseconds."""
    if name in SHARES:
        return 100 * value
    return value / 1e9 if name == "peak_memory" else 1000 * value if name == "seconds_per_example" else value


def number(name: str, value: float) -> str:
    """A value with as many digits as its kind deserves."""
    value = scaled(name, value)
    if name in ("seconds", "trainable", "tokens_per_second"):
        return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"
    digits = (
        1
        if name in (*SHARES, "seconds_per_example")
        else 2
        if name == "peak_memory"
        else 4
        if name == "loss"
        else 3
    )
    return f"{value:.{digits}f}"


def figure_text(name: str, figure: Figure | None) -> str:
    """``MEAN ± STANDARD DEVIATION``, ``MEAN (RANGE)`` of two seeds, or the value of a single one."""
    if figure is None:
        return MISSING
    text = number(name, figure["mean"])
    if name == "trainable":
        return text
    if figure["spread"] is not None:
        spread = number(name, figure["spread"])
        text = f"{text} ± {spread}" if figure["spread_is"] == "standard deviation" else f"{text} ({spread})"
    if name == "routing_entropy":
        text += f"; {figure['mean'] / NATS_A_BIT:.3f} bits"
    return text


def signed_text(name: str, figure: Figure) -> str:
    """The same of a difference, with its sign."""
    text = figure_text(name, figure)
    return text if text.startswith("-") else f"+{text}"


def spread_note(results: Results) -> str:
    """What stands behind a mean in the tables."""
    count = len(results["seeds"])
    if count == 1:
        return f"One seed ({results['seeds'][0]}): there is no spread to tell a difference from chance."
    listed = ", ".join(map(str, results["seeds"]))
    kind = "in parentheses the range" if count == 2 else "± sample standard deviation (n − 1)"
    return f"Mean over {count} seeds ({listed}), {kind} over the seeds."


PAPER_NOTE = (
    "The paper's own figures, on its own models and data; with each, what this comparison has. An average is "
    "over each one's own domains."
)


def command_of(results: Results) -> str:
    """The command that makes the comparison again."""
    words = ["dsmixer", "compare", str(results["file"])]
    words += ["--scale", results["scale"]] if results["scale"] else []
    words += ["--seeds", ",".join(map(str, results["seeds"])), *results["overrides"]]
    words += ["--only", *results["only"]] if results["only"] else []
    return shlex.join(words)


def missing_note(results: Results) -> str:
    """How many cells are not done, and the first of them; empty where all are."""
    missing = results["missing"]
    if not missing:
        return ""
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    listed = ", ".join(missing[:3])
    told = f"Not complete: {len(missing)} of {results['cells']} cells are not done ({listed}{more})."
    return f"{told} Each mean is over the seeds that its row has."


def cell_of(row: Mapping[str, Any], metric: str, domain: str) -> Figure | None:
    """The figure of a row, None where it has none."""
    found: Figure | None = row["cells"].get(metric, {}).get(domain)
    return found


def columns_of(results: Results, metric: str) -> list[str]:
    """Domains that some row has the metric of, and their mean."""
    there = {domain for row in results["table"] for domain in row["cells"].get(metric, {})}
    domains = [domain for domain in results["domains"] if domain in there]
    return [*domains, results["mean"]] if len(domains) > 1 else domains


def metrics_of(results: Results) -> list[str]:
    """The metrics of the table that some row has."""
    return [metric for metric in results["columns"] if columns_of(results, metric)]


def rows_with(results: Results, metric: str) -> list[Mapping[str, Any]]:
    """Rows that have the metric."""
    return [row for row in results["table"] if row["cells"].get(metric)]


def measures_there(results: Results) -> list[str]:
    """The measures of the table that some row has."""
    return [
        name for name in results["measure_names"] if any(name in row["measures"] for row in results["table"])
    ]


def best_of(results: Results, metric: str, column: str) -> set[str]:
    """The rows that have the best mean of a column, of variants and of methods that are told as little."""
    found = [
        (cell_of(row, metric, column), row["row"]) for row in results["table"] if row["kind"] in COMPETING
    ]
    known = [(figure["mean"], name) for figure, name in found if figure is not None]
    if len(known) < 2:
        return set()
    best = (min if lower_is_better(metric) else max)(known)[0]
    return {name for mean, name in known if mean == best}


PAIRED_NOTE = (
    "Each seed's figure less that of the first variant on the same seed, data and experts. What seeds differ "
    "in by themselves is not in the spread, so that a small difference can be told from none."
)


def paired(results: Results, metric: str) -> tuple[str, list[tuple[str, Figure]]]:
    """How far other rows are from the first variant, seed by seed, in the mean over domains.

    Returns:
        The first variant's row, and of every other variant and method on the same experts its row with mean
        and spread of the differences; nothing where there is no other, or one seed.
    """
    rows = [row for row in rows_with(results, metric) if row["kind"] in COMPETING]
    first = next((row for row in rows if row["kind"] == "variant"), None)
    if first is None:
        return "", []
    column, found = columns_of(results, metric)[-1], []
    of_first = (cell_of(first, metric, column) or {}).get("values", {})
    for row in rows:
        theirs = (cell_of(row, metric, column) or {}).get("values", {})
        seeds = [seed for seed in of_first if seed in theirs]
        if row is not first and row["trunk"] == first["trunk"] and len(seeds) > 1:
            found.append((row["row"], _figure([theirs[seed] - of_first[seed] for seed in seeds])))
    return first["row"], found


def _figure(values: Sequence[float]) -> Figure:
    two = len(values) == 2
    spread = abs(values[0] - values[1]) if two else stdev(values)
    return {"mean": fmean(values), "spread": spread, "spread_is": "range" if two else "standard deviation"}


def paper_match(results: Results, metric: str, unit: str, row: str, column: str) -> str | None:
    """The comparison's own figure beside one of a paper's, in the paper's unit; None where it has none.

    A column is a domain, ``average`` or ``mean``, or a measure.
    """
    own = next(
        (r for r in results["table"] if row in (r["row"], r["method"] if not r["variant"] else None)), None
    )
    if own is None:
        return None
    domain = results["mean"] if column in ("average", "mean") else column
    figure = own["measures"].get(column) or cell_of(own, metric, domain)
    if figure is None:
        return None
    name = column if column in own["measures"] else metric
    if name in SHARES and "%" not in unit:
        return f"{figure['mean']:.3g}"
    return figure_text(name, figure)
