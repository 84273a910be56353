"""The report of a run: one page that needs nothing beside itself."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dsmixer.report.colors import expert_colors
from dsmixer.report.css import CSS
from dsmixer.report.html import Markup, join, tag
from dsmixer.report.parts.again import again
from dsmixer.report.parts.headline import headline
from dsmixer.report.parts.placement import placement
from dsmixer.report.parts.routing import routing
from dsmixer.report.parts.score_tables import evaluation
from dsmixer.report.parts.texts import texts, whole_trace
from dsmixer.report.parts.trained import balance, curves, trained
from dsmixer.report.run_folder import RunFolder, read_run
from dsmixer.report.scores import scores_of

NOTHING_FROM_ELSEWHERE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def build_report(run_folder: Path) -> Path:
    """Write ``report/index.html`` into a run folder, over an earlier one.

    Args:
        run_folder: holds ``config.yaml``, and as far as the run came ``metrics.jsonl``, ``evaluation.json``,
            ``routing.json``, ``examples.json`` and ``plan.json``.

    Returns:
        The page.

    Raises:
        UserError: it is no run folder, or one of its files is damaged.
    """
    page = render(read_run(run_folder))
    target = Path(run_folder) / "report" / "index.html"
    target.parent.mkdir(exist_ok=True)
    beside = target.with_name(".index.html.new")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, target)
    return target


def render(run: RunFolder) -> str:
    """The whole page as text."""
    scores = scores_of(run.evaluation, run.config)
    parts = [
        trained(run),
        evaluation(scores),
        routing(run),
        texts(run),
        curves(run),
        balance(run),
        placement(run),
        again(run),
    ]
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=NOTHING_FROM_ELSEWHERE),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{run.name}: a mixture of LoRA experts"),
        tag("style", Markup(CSS + _expert_colors(run))),
    )
    body = join(
        tag("header", tag("h1", run.name), tag("p", _subtitle(run))),
        headline(run, scores),
        _contents(parts),
        *parts,
    )
    page = tag("html", tag("head", head), tag("body", tag("main", body)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _contents(parts: list[Markup]) -> Markup:
    """Links to the parts that there are."""
    found = [re.match(r'<section id="(\w+)"><h2>(.*?)</h2>', part) for part in parts]
    links = [tag("a", Markup(match[2]), href=f"#{match[1]}") for match in found if match]
    return tag("nav", *links)


def _expert_colors(run: RunFolder) -> str:
    return "" if run.examples is None else expert_colors(whole_trace(run.examples).order())


def _subtitle(run: RunFolder) -> str:
    stages = " and ".join({1: "one", 2: "two"}.get(stage, str(stage)) for stage in sorted(run.metrics))
    stages = f"stages {stages}" if len(run.metrics) > 1 else f"stage {stages}" if stages else ""
    base = run.setting("base.model")
    parts = ["A mixture of LoRA experts", f"over {base}" if base else "", f"· {stages}" if stages else ""]
    return " ".join(part for part in parts if part)
