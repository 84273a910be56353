"""Table, plots and page of a comparison from its ``results.json`` alone."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from dsmixer.report.comparison_page import render, write_comparison
from dsmixer.report.comparison_plots import figures_of
from dsmixer.report.comparison_tables import markdown, table_csv
from dsmixer.report.comparison_values import figure_text

MEAN = "mean of domains"
EVIL = "</script><img src=x onerror=alert(1)>|**`[x](y)`‮"


def figure(*values: float) -> dict[str, Any]:
    kind = {1: None, 2: "range"}.get(len(values), "standard deviation")
    spread = None if len(values) == 1 else abs(values[0] - values[1]) if len(values) == 2 else stdev(values)
    by_seed = {str(seed): value for seed, value in enumerate(values)}
    return {"mean": fmean(values), "spread": spread, "spread_is": kind, "values": by_seed}


def table_row(label: str, kind: str, losses: dict[str, tuple[float, ...]], **more: Any) -> dict[str, Any]:
    cells = {"loss": {domain: figure(*values) for domain, values in losses.items()}}
    variant = label if kind == "variant" else None
    own = {"row": label, "kind": kind, "variant": variant, "trunk": "t", "method": label, "name": label}
    return {**own, "point": {}, "measures": {}, **more, "cells": {**cells, **more.get("cells", {})}}


def results(**changes: Any) -> dict[str, Any]:
    rows = [
        table_row("base", "reference", {"law": (2.0, 2.0, 2.0), MEAN: (2.0, 2.0, 2.0)}),
        table_row("uniform", "method", {"law": (1.5, 1.5, 1.5), MEAN: (1.5, 1.5, 1.5)}),
        table_row(
            "RSL",
            "variant",
            {"law": (1.2, 1.4, 1.3), "code": (1.0, 1.0, 1.0), MEAN: (1.1, 1.2, 1.15)},
            cells={"accuracy": {"law": figure(0.7, 0.8, 0.9)}},
            measures={"routing_entropy": figure(0.5), "trainable": figure(1200.0)},
        ),
    ]
    found: dict[str, Any] = {
        "name": "losses",
        "title": "Losses on the routers",
        "source": "a paper, Table 8",
        "note": None,
        "plots": ["scores", "loads", "entropy", "losses"],
        "paper": [
            {"metric": "accuracy", "unit": "%", "rows": {"RSL": {"law": 95.41}, "GMoE": {"law": 91.38}}}
        ],
        "scale": "small",
        "file": "losses.yaml",
        "base": "some/model",
        "seeds": [0, 1, 2],
        "overrides": ["stage2.epochs=2"],
        "only": ["RSL"],
        "variants": ["RSL"],
        "settings": {"RSL": {"stage2.top_k": 2}},
        "axes": [],
        "columns": ["loss", "accuracy"],
        "measure_names": ["routing_entropy", "trainable"],
        "cells": 9,
        "missing": [],
        "domains": ["law", "code"],
        "mean": MEAN,
        "table": rows,
        "curves": {
            "loads": {"RSL": {"domains": ["law"], "experts": ["a", "b"], "load": [[0.25, 0.75]]}},
            "entropy": {"RSL": {"layers": ["0", "1"], "values": [0.5, None], "limit": 0.69}},
            "losses": {"RSL": {"steps": [1, 2, 3], "values": [0.3, 0.2, 0.1]}},
        },
    }
    return {**found, **changes}


def test_a_mean_stands_with_its_spread_in_the_unit_of_its_kind() -> None:
    assert figure_text("loss", figure(1.2, 1.4, 1.3)) == "1.3000 ± 0.1000"
    assert figure_text("accuracy", figure(0.7, 0.8)) == "75.0 (10.0)"
    assert figure_text("recovered", figure(0.714)) == "71.4"
    assert figure_text("routing_entropy", figure(0.6931471805599453)) == "0.693; 1.000 bits"
    assert figure_text("peak_memory", figure(1.5e9)) == "1.50"
    assert figure_text("loss", None) == "—"


def test_the_markdown_table_holds_every_figure_and_marks_the_best_of_what_is_compared() -> None:
    text = markdown(results())
    assert "| RSL | **1.3000 ± 0.1000** | 1.0000 ± 0.0000 | **1.1500 ± 0.0500** |" in text
    assert "| base | 2.0000 ± 0.0000 | — | 2.0000 ± 0.0000 |" in text
    assert "Mean over 3 seeds (0, 1, 2), ± sample standard deviation (n − 1)" in text
    assert "| RSL | 95.41 (here 80.0 ± 10.0) |" in text and "| GMoE | 91.38 |" in text
    assert "lower is better" in text and "| RSL | 0.500; 0.721 bits | 1,200 |" in text


def test_the_csv_gives_each_seed_back() -> None:
    lines = list(csv.DictReader(io.StringIO(table_csv(results()))))
    law = next(l for l in lines if (l["row"], l["quantity"], l["domain"]) == ("RSL", "loss", "law"))
    assert [float(value) for value in law["values"].split(";")] == [1.2, 1.4, 1.3]
    assert law["seeds"] == "0;1;2" and float(law["spread"]) == pytest.approx(0.1)
    assert {line["quantity"] for line in lines} == {"loss", "accuracy", "routing_entropy", "trainable"}


def test_differences_are_taken_seed_by_seed_from_the_first_variant() -> None:
    other = table_row("GMoE", "variant", {"law": (1.0, 1.0, 1.0), MEAN: (1.15, 1.28, 1.18)})
    elsewhere = {**table_row("other experts", "variant", {MEAN: (9.0, 9.0, 9.0)}), "trunk": "u"}
    some = results(table=[*results()["table"], other, elsewhere])
    # 1.15 - 1.1, 1.28 - 1.2, 1.18 - 1.15: mean 0.16 / 3, deviations -1, 8, -7 of 300
    spread = ((1 + 64 + 49) / 300**2 / 2) ** 0.5
    line = f"| GMoE | +0.0533 ± {spread:.4f} |"
    text, page = markdown(some), render(some, [])
    assert line in text and "difference from RSL" in text and "| uniform | +0.3500 ± 0.0500 |" in text
    assert "+0.0533" in page and "| other experts | +" not in text and "| base | +" not in text
    one = results(seeds=[0], table=[table_row(name, "variant", {MEAN: (1.0,)}) for name in ("a", "b")])
    assert "Seed by seed" not in markdown(one)


def test_a_row_that_is_told_the_domain_is_never_the_best_though_it_is_better() -> None:
    told = table_row("lorahub_per_domain, told the domain", "told", {"law": (0.5,), MEAN: (0.5,)})
    text = markdown(results(table=[*results()["table"], told]))
    assert "| lorahub_per_domain, told the domain | 0.5000 | — | 0.5000 |" in text
    assert "| RSL | **1.3000 ± 0.1000** |" in text
    page = render(results(table=[*results()["table"], told]), [])
    assert re.search(r'<tr class="reference"><th scope="row">lorahub_per_domain, told', page)


def test_entropies_of_unlike_layers_stand_each_at_its_own_layer() -> None:
    curves = {
        "whole": {"layers": ["0", "1", "2", "10"], "values": [0.1, 0.2, 0.3, 0.4], "limit": 0.69},
        "pruned": {"layers": ["2", "10"], "values": [0.5, 0.6], "limit": 1.1},
    }
    (_, _, plot), *_ = figures_of(results(curves={"entropy": curves}, plots=["entropy"]))
    axes = plot.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "10"]
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert drawn["pruned"] == [2.0, 3.0] and drawn["whole"] == [0.0, 1.0, 2.0, 3.0]
    assert {"ln 2, the most there can be", "ln 3, the most there can be"} <= set(drawn), (
        "two pools, two bounds"
    )


def test_what_is_missing_is_told_before_any_figure() -> None:
    some = results(missing=["cells/RSL/seed-2", "methods/t/seed-2"])
    for text in (markdown(some), render(some, [])):
        assert "Not complete: 2 of 9 cells are not done (cells/RSL/seed-2, methods/t/seed-2)." in text
    assert "Not complete" not in markdown(results())


class Parsed(HTMLParser):
    """Names of elements, and what they point at."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_needs_nothing_beside_itself_and_shows_the_table(tmp_path: Path) -> None:
    files = write_comparison(tmp_path, results())
    page = Path(files["page"]).read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert (
        all(link.startswith(("#", "data:image/png;")) for link in parsed.links)
        and "script" not in parsed.tags
    )
    assert not re.search(r"url\((?!#)", page) and "@import" not in page
    assert "1.3000 ± 0.1000" in page and "95.41" in page and "here 80.0 ± 10.0" in page
    again = "dsmixer compare losses.yaml --scale small --seeds 0,1,2 stage2.epochs=2 --only RSL"
    assert again in page and again in markdown(results())
    assert page.count("<svg") == len(list((tmp_path / "plots").glob("*.svg"))) >= 4


def test_names_of_a_user_are_text_wherever_they_stand(tmp_path: Path) -> None:
    rows = [table_row(EVIL, "variant", {EVIL: (1.0, 2.0), MEAN: (1.0, 2.0)})]
    evil = results(
        title=EVIL, note=EVIL, source=EVIL, base=EVIL, table=rows, domains=[EVIL], variants=[EVIL],
        settings={EVIL: {"x": EVIL}}, missing=[EVIL],
        curves={"loads": {EVIL: {"domains": [EVIL], "experts": [EVIL], "load": [[1.0]]}}},
    )  # fmt: skip
    files = write_comparison(tmp_path, evil)
    parsed = Parsed(Path(files["page"]).read_text(encoding="utf-8"))
    assert not {"script", "img"} & set(parsed.tags)
    for svg in (tmp_path / "plots").glob("*.svg"):
        ElementTree.parse(svg)
        assert svg.parent == tmp_path / "plots"
    lines = Path(files["table"]).read_text(encoding="utf-8").splitlines()
    assert all(line.count("|") - line.count("\\|") in (0, 3, 4) for line in lines), "no cell begins another"
    assert "<img" not in "\n".join(lines)


def with_axes() -> dict[str, Any]:
    rows = [
        table_row(
            f"a={a}, b={b}",
            "variant",
            {"law": (a + b, a + b + 0.1), MEAN: (a + b, a + b + 0.1)},
            point={"a": str(a), "b": str(b)},
            name="mixture",
            measures={"routing_entropy": figure(a * b)},
        )
        for a in (0.1, 0.2, 0.4)
        for b in (1, 2)
    ]
    axes = [
        {"name": "a", "key": "x.a", "values": ["0.1", "0.2", "0.4"]},
        {"name": "b", "key": "x.b", "values": ["1", "2"]},
    ]
    labels = [row["row"] for row in rows]
    return results(
        axes=axes, table=rows, plots=["lines", "grid"], columns=["loss"], variants=labels,
        settings={label: {} for label in labels}, paper=None, domains=["law"],
    )  # fmt: skip


def test_lines_run_over_the_first_axis_with_one_line_for_each_point_of_the_others() -> None:
    (_, _, plot), *_ = figures_of({**with_axes(), "plots": ["lines"]})
    axes = plot.axes[0]
    assert axes.get_legend_handles_labels()[1] == ["b=1", "b=2"]
    x, y = axes.containers[0].lines[0].get_data()
    assert list(x) == [0.1, 0.2, 0.4] and list(y) == pytest.approx([1.15, 1.25, 1.45])


def test_a_grid_has_a_cell_for_each_point_of_two_axes() -> None:
    grids = {name: plot for name, _, plot in figures_of({**with_axes(), "plots": ["grid"]})}
    assert set(grids) == {"grid-loss", "grid-routing_entropy"}
    texts = [text.get_text() for text in grids["grid-loss"].axes[0].texts]
    assert texts == ["1.1500", "2.1500", "1.2500", "2.2500", "1.4500", "2.4500"]


def test_each_point_of_a_third_axis_has_a_grid_of_its_own() -> None:
    two = with_axes()
    rows = [
        {**row, "row": f"{row['row']}, c={c}", "point": {**row["point"], "c": c}, "cells": {"loss": {
            domain: figure(*(value + float(c) for value in cell["values"].values()))
            for domain, cell in row["cells"]["loss"].items()
        }}}
        for row in two["table"]
        for c in ("0", "5")
    ]  # fmt: skip
    axes = [*two["axes"], {"name": "c", "key": "x.c", "values": ["0", "5"]}]
    grids = {
        name: plot for name, _, plot in figures_of({**two, "axes": axes, "table": rows, "plots": ["grid"]})
    }
    for c, first in (("0", "1.1500"), ("5", "6.1500")):
        assert grids[f"grid-loss-c={c}"].axes[0].texts[0].get_text() == first


def test_a_comparison_with_nothing_done_has_a_page_that_says_so(tmp_path: Path) -> None:
    nothing = results(table=[], curves={}, domains=[], missing=["experts/t/seed-0"], cells=1)
    files = write_comparison(tmp_path, nothing)
    assert "1 of 1 cells are not done" in Path(files["page"]).read_text(encoding="utf-8")
