"""An evaluation as tables and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsmixer.checkpoint import atomic
from dsmixer.config.errors import RefusedError

WIDE = 8  # methods up to which a table has a column for each

METRIC_TITLES = {
    "loss": "held-out loss (nats a target token, lower is better)",
    "accuracy": "accuracy by log-likelihood of the choice",
    "accuracy_norm": "accuracy by log-likelihood per byte of the choice",
    "exact_match": "exact match of written answers",
}


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print a table a metric, domains down and methods across, then what the routers did.

    Args:
        result: what ``evaluate_mixture`` returns, or ``evaluation.json`` holds.
    """
    for metric in dict.fromkeys(row["metric"] for row in result["rows"]):
        console.print(metric_table(result, metric))
    routing = result.get("routing")
    if routing:
        console.print(routing_line(routing["summary"]))


def metric_table(result: Mapping[str, Any], metric: str) -> Table:
    """One metric by domain and method; ``loss`` with the recovered share beside it.

    With many experts only each domain's own has a column, ``own expert``, and before stage two another,
    ``own expert@stage1``.
    """
    rows = [row for row in result["rows"] if row["metric"] == metric]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["domain"], row["method"]): row["value"] for row in rows}
    if len(methods) > WIDE:
        methods = _experts_as_own(result, cells, methods)
    shares = result.get("recovered") or {} if metric == "loss" else {}
    table = Table(title=METRIC_TITLES.get(metric, metric), title_justify="left")
    table.add_column("domain")
    for heading in (*methods, *(["recovered"] if shares else [])):
        table.add_column(heading, justify="right")
    for domain in domains:
        values = [cells.get((domain, method)) for method in methods]
        texts = ["" if value is None else f"{value:.4f}" for value in values]
        share = shares.get(domain)
        texts += ["-" if share is None else f"{share:.1%}"] if shares else []
        table.add_row(domain, *texts)
    return table


def _experts_as_own(
    result: Mapping[str, Any], cells: dict[tuple[str, str], Any], methods: list[str]
) -> list[str]:
    """The columns where the experts have one together; puts its values into ``cells``."""
    experts = result.get("own_experts") or {}
    own = {}
    for method in methods:
        if method.startswith("expert:"):
            _, at, state = method.partition("@")
            own[f"own expert{at}{state}"] = f"{at}{state}"
    for domain in {domain for domain, _ in cells}:
        for column, state in own.items():
            value = cells.get((domain, f"expert:{experts.get(domain, domain)}{state}"))
            if value is not None:
                cells[domain, column] = value
    others = [method for method in methods if not method.startswith("expert:")]
    first = others.index("base") + 1 if "base" in others else 0
    return [*others[:first], *own, *others[first:]]


def routing_line(summary: Mapping[str, Any]) -> str:
    """The routers in a sentence: how often the own expert comes first, and how sure they are."""
    text = f"token entropy of the routers {summary['entropy']:.3f} nats (ln E = {summary['ln_experts']:.3f})"
    for key, where in (
        ("own_first_mean", "all layers"),
        ("own_first_later_layers_mean", "layers after the first"),
    ):
        if summary.get(key) is not None:
            text += f"; own expert first for {summary[key]:.1%} of the tokens ({where})"
    return text


def write_evaluation(run_folder: Path, result: Mapping[str, Any]) -> None:
    """Write ``evaluation.json`` and, beside it, ``routing.json`` where the mixture was scored.

    Args:
        run_folder: the run's folder.
        result: what ``evaluate_mixture`` returns.

    Raises:
        RefusedError: a file can't be written.
    """
    routing, rest = result["routing"], {key: value for key, value in result.items() if key != "routing"}
    if routing is None:
        (run_folder / "routing.json").unlink(missing_ok=True)  # of an evaluation before, in the same folder
        write_json(run_folder / "evaluation.json", rest)
        return
    write_json(run_folder / "routing.json", routing)
    write_json(run_folder / "evaluation.json", {**rest, "routing": routing["summary"]})


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file that appears whole or not at all.

    Raises:
        RefusedError: it can't be written.
    """
    try:
        atomic.write_json(Path(path), value, indent=2, allow_nan=True)
    except OSError as error:
        raise RefusedError(
            f"cannot be written: {error}", where=str(path), fix="choose another file"
        ) from error
