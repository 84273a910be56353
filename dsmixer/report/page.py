"""The report of a run: one page that needs nothing beside itself."""

from __future__ import annotations

import os
from pathlib import Path

from dsmixer.report import sections
from dsmixer.report.css import CSS
from dsmixer.report.html import Markup, join, tag
from dsmixer.report.run_folder import RunFolder, read_run
from dsmixer.report.scores import scores_of


def build_report(run_folder: Path) -> Path:
    """Write ``report/index.html`` into a run folder, over an earlier one.

    Args:
        run_folder: holds ``config.yaml``, and as far as the run came ``metrics.jsonl``, ``evaluation.json``,
            ``routing.json`` and ``plan.json``.

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
    title = f"{run.name}: a mixture of LoRA experts"
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    body = join(
        tag("header", tag("h1", run.name), tag("p", _subtitle(run))),
        sections.headline(run, scores),
        sections.trained(run),
        sections.curves(run),
        sections.evaluation(scores),
        sections.routing(run),
        sections.plan(run),
    )
    page = tag("html", tag("head", head), tag("body", tag("main", body)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _subtitle(run: RunFolder) -> str:
    stages = " and ".join({1: "one", 2: "two"}.get(stage, str(stage)) for stage in sorted(run.metrics))
    stages = f"stages {stages}" if len(run.metrics) > 1 else f"stage {stages}" if stages else ""
    base = run.setting("base.model")
    parts = ["A mixture of LoRA experts", f"over {base}" if base else "", f"· {stages}" if stages else ""]
    return " ".join(part for part in parts if part)
