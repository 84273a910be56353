"""The page, read by Python's own HTML parser: balanced, self-contained, escaped, with the right figures."""

from __future__ import annotations

import argparse
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dsmixer.cli import report as report_command
from dsmixer.config.errors import UserError
from dsmixer.report.figures import by_layer, entropy_figure, routing_figures
from dsmixer.report.gains import gain_map
from dsmixer.report.html import VOID, tag
from dsmixer.report.page import build_report
from dsmixer.report.parts.headline import headline
from dsmixer.report.picture import result_picture
from dsmixer.report.plots import Curve, as_pixels, as_svg, line_figure, running_mean, thin
from dsmixer.report.run_folder import read_run
from dsmixer.report.scores import scores_of

EVIL = ("<script>alert(1)</script>", 'a&b "$x_1$', "c'd</text><img src=http://x.org/y>")


class Page(HTMLParser):
    """What a page holds; complains of an element that is not closed where it should be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[list[tuple[str, str]]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append((str(dict(attrs).get("class")), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            kind, text = self.cells[-1][-1]
            self.cells[-1][-1] = (kind, text + data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def row(self, first: str, number: int = 0) -> dict[str, str]:
        """The cells of the number-th table row of this name, by their column's title."""
        found = [(index, row) for index, row in enumerate(self.cells) if row[0][1] == first][number]
        head = next(row for row in reversed(self.cells[: found[0]]) if row[0][1] == "domain")
        return {title: text for (_, title), (_, text) in zip(head, found[1], strict=True)}


def test_page_is_balanced_and_needs_nothing_beside_itself(make_run):
    page = Page(build_report(make_run()))
    assert not page.tags("script") and not page.tags("link") and not page.tags("iframe")
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value is not None and value.startswith(("#", "data:"))
    style = "".join(page.texts[index] for index in range(3))
    assert "@import" not in page.text and "url(http" not in style
    assert {"charset": "utf-8"} in page.tags("meta")
    assert any(attributes.get("name") == "viewport" for attributes in page.tags("meta"))


def test_ids_of_the_figures_do_not_meet_and_every_reference_has_its_id(make_run):
    page = Page(build_report(make_run()))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    links = [attributes["xlink:href"] for _, attributes in page.elements if "xlink:href" in attributes]
    assert {link[1:] for link in links if link and link.startswith("#")} <= set(ids)
    clips = [attributes["clip-path"] for _, attributes in page.elements if "clip-path" in attributes]
    assert clips and {clip[5:-1] for clip in clips if clip} <= set(ids)


def test_names_are_text_wherever_they_stand(make_run):
    folder = make_run(domains=EVIL)
    path = build_report(folder)
    page = Page(path)
    assert not page.tags("script") and not page.tags("img")
    assert "<script" not in path.read_text(encoding="utf-8")
    for name in EVIL:
        assert any(name == text for text in page.texts), name  # a table's cell
    labels = [text for text in page.texts if text.strip() in EVIL[:2]]
    assert len(labels) > 2 * 4  # axis labels of the figures as well, the dollars among them


def test_every_part_is_told_about(make_run):
    page = Page(build_report(make_run()))
    for expected in (
        "three_domains",
        "base/model",
        "3: law, chess, code",
        "Stage one: loss",
        "Stage two: loss",
        "Routers: entropy of a token beside ln E",
        "ln E, the most there can be",
        "Routers: variance of the load over experts",
        "Held-out loss, nats a target token",
        "Accuracy, by log-likelihood",
        "First expert of a token, by domain",
        "First expert of a token, by layer",
        "Own expert first, by layer and domain",
        "123.46 kB",
        "7.20 MB",
        "it sends least",
        "Probability of the own expert, by layer and domain",
        "Entropy of a token, by layer, beside ln E",
        "Routing loss",
        "Texts, token by token",
        "deepspeed --num_accelerators 2 launch/train.py",
    ):
        assert expected in page.text, expected
    assert len(page.tags("svg")) == 11


def test_evaluation_table_has_the_values_the_recovered_share_and_marks_the_best(make_run):
    page = Page(build_report(make_run()))
    assert page.row("chess") == {
        "domain": "chess",
        "base": "3.0000",
        "own expert": "1.0000",
        "uniform": "2.5000",
        "mixture": "0.9000",
        "recovered": "105.0 %",
        "examples": "1,000",
    }
    assert page.row("code")["recovered"] == "50.0 %"
    assert page.row("mean")["recovered"] == "81.7 %"  # of 90, 105 and 50
    assert page.row("mean")["mixture"] == "1.1000"
    assert page.row("law", 1)["mixture"] == "75.0 %"
    best = [[text for kind, text in row if "best" in kind] for row in page.cells]
    assert [row for row in best if row] == [["1.0000"], ["0.9000"], ["1.1000"], ["1.0333"], ["75.0 %"]]


def test_headline_says_what_the_routers_do_after_the_first_layer(make_run):
    text = Page(build_report(make_run())).text
    assert "81.7 %" in text and "3 of 3" in text and "80.0 %" in text  # mean of layers 0.7 and 0.9


def changed_routing(folder, **values):
    """The run with other values in its routing; None takes a key away."""
    path = folder / "routing.json"
    kept = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        # both sides of an encoder-decoder model have a first layer: what is left out is the summary's to say
        ({"own_first_mean": 0.5, "own_first_later_layers_mean": 0.123}, "12.3 % layers after the first"),
        ({"own_first_mean": 0.456, "own_first_later_layers_mean": None}, "45.6 % routers"),
        ({"own_first_mean": None}, None),
        (None, None),
    ],
)
def test_the_headline_has_the_own_expert_first_as_the_summary_of_the_routing_has_it(make_run, summary, told):
    tiles = dict(headline_tiles(changed_routing(make_run(), summary=summary)))
    found = {what: figure for what, figure in tiles.items() if "put their own expert first" in what}
    if told is None:
        assert not found
    else:
        figure, _, where = told.partition(" % ")
        beginning = "of tokens put their own expert first, mean of domains and "
        assert found == {f"{beginning}{where}": f"{figure} %"}


def headline_tiles(folder):
    """Text and figure of each tile."""
    run = read_run(folder)
    figures = re.findall(
        r"<b>(.*?)</b><span>(.*?)</span>", headline(run, scores_of(run.evaluation, run.config))
    )
    return [(what, figure) for figure, what in figures]


def test_domains_are_in_the_recipes_order_everywhere(make_run):
    folder = make_run()
    path = folder / "evaluation.json"
    rows = json.loads(path.read_text())["rows"]
    # as a run writes them: what is known of choices alone comes first, and only of some domains
    first = [{**rows[0], "domain": "code", "method": "majority", "metric": "accuracy"}]
    path.write_text(json.dumps({"rows": [*first, *reversed(rows)]}))
    run = read_run(folder)
    scores = scores_of(run.evaluation, run.config)
    order = ["law", "chess", "code"]
    assert scores.domains == order and gain_map(scores).rows == order and scores.experts == order
    page = Page(build_report(folder))
    names = [row[0][1] for row in page.cells if row and row[0][1] in order]
    assert names[:3] == order and names[3:5] == ["law", "code"]  # the losses, then the accuracies
    (_, by_domain), *_ = routing_figures(run.routing)
    assert [label.get_text() for label in by_domain.axes[0].get_yticklabels()] == order
    unnamed = scores_of(run.evaluation, {})  # domains of a source: the losses have all of them in order
    assert unnamed.domains == ["code", "chess", "law"]


def test_what_no_router_saw_is_grey_and_no_share_of_zero(make_run):
    folder = make_run()
    kept = json.loads((folder / "routing.json").read_text())
    load, own = kept["load"], kept["own_first_share"]
    for row in load:
        row[1] = [None] * 3
    for row in own:
        row[1] = None
    pictures = dict(
        routing_figures(read_run(changed_routing(folder, load=load, own_first_share=own)).routing)
    )
    mesh = pictures["First expert of a token, by domain"].axes[0].collections[0]
    assert mesh.get_array().reshape(3, 3).mask.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    texts = [text.get_text() for text in pictures["First expert of a token, by domain"].axes[0].texts]
    assert texts[3:6] == ["", "", ""] and "0" not in texts
    own_first = pictures["Own expert first, by layer and domain"].axes[0]
    assert [label.get_text() for label in own_first.get_xticklabels()] == ["law", "code"]


@pytest.mark.parametrize("num_layers", [2, 12, 24])
def test_layers_of_both_sides_do_not_lie_on_each_other(num_layers):
    layers = [f"{side} layer {index}" for side in ("encoder", "decoder") for index in range(num_layers)]
    figure = entropy_figure("Entropy", layers, np.linspace(0, 1, len(layers)), 6)
    as_pixels(figure)  # lays it out
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert len(labels) > 3 and labels[0].get_text() == "encoder 0"
    anchors = [label.get_transform().transform(label.get_position())[0] for label in labels]
    for one, other, label in zip(anchors, anchors[1:], labels[1:], strict=False):
        angle = math.radians(label.get_rotation())
        label.set_rotation(0)
        extent = label.get_window_extent()
        # names at an angle are parallel lines of text: what lies between them is across the reading direction
        assert (other - one) * math.sin(angle) >= extent.height or other - one >= extent.width


def test_a_title_of_few_columns_is_whole(make_run):
    folder = changed_routing(make_run(), experts=["a", "b", "c"])
    for caption, figure in routing_figures(read_run(folder).routing):
        as_pixels(figure)
        title = figure._suptitle or figure.axes[0].title
        box, canvas = title.get_window_extent(), figure.bbox
        assert title.get_text() or figure.axes[0].get_title(loc="left"), caption
        assert box.x0 >= 0 and box.x1 <= canvas.x1, caption


@pytest.mark.parametrize(
    ("parts", "absent"),
    [
        (("metrics.jsonl",), ["First expert", "Placement and memory"]),
        (("evaluation.json",), ["Stage one: loss", "First expert"]),
        (("routing.json", "plan.json"), ["Stage one: loss", "Held-out loss"]),
    ],
)
def test_a_run_with_parts_missing_has_a_page_without_them(make_run, parts, absent):
    page = Page(build_report(make_run(*parts)))
    assert "three_domains" in page.text
    for text in absent:
        assert text not in page.text
    assert ("This run was not evaluated." in page.text) == ("evaluation.json" not in parts)


def test_a_run_of_stage_two_alone(make_run):
    folder = make_run("metrics.jsonl")
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(line for line in path.read_text().split("\n") if '"stage": 2' in line))
    text = Page(build_report(folder)).text
    assert "Stage two: loss" in text and "Stage one: loss" not in text and "stage two" in text


def test_settings_alone_make_a_page(make_run):
    folder = make_run("plan.json")
    (folder / "config.yaml").write_text("run: {seed: 1}\nmixer: null\ndata: [1, 2]\n")
    assert "No step was logged." in Page(build_report(folder)).text


def test_a_second_report_replaces_the_first_and_leaves_nothing_beside_it(make_run):
    folder = make_run()
    first = build_report(folder).read_text(encoding="utf-8")
    assert build_report(folder).read_text(encoding="utf-8") == first
    assert [path.name for path in (folder / "report").iterdir()] == ["index.html"]


@pytest.mark.parametrize(
    ("file", "text", "where"),
    [
        ("evaluation.json", "{", "evaluation.json:1"),
        ("evaluation.json", '{"rows": [{"domain": "law"}]}', "rows.0"),
        ("evaluation.json", '{"results": []}', "evaluation.json"),
        ("routing.json", '{"routers": ["a"], "experts": ["b"], "domains": ["c"], "load": [[1, 2]]}', "load"),
        ("plan.json", "[]", "plan.json"),
        ("config.yaml", "run: [", "config.yaml:1"),
    ],
)
def test_a_damaged_file_is_named(make_run, file, text, where):
    folder = make_run()
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=where):
        build_report(folder)
    assert not (folder / "report").exists()


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    for folder, problem in ((tmp_path, "no run folder"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(UserError, match=problem):
            build_report(folder)
    assert list(tmp_path.iterdir()) == []


def test_expert_of_a_domain_comes_from_the_settings():
    rows = [
        {"domain": "law", "method": method, "metric": "loss", "value": value}
        for method, value in {"base": 2.0, "expert:law": 1.9, "expert:jurist": 1.0, "mixture": 1.5}.items()
    ]
    config = {"data": {"domains": [{"name": "law", "expert": "jurist"}]}}
    assert scores_of(rows, config).share_of_own_gain("law", "mixture") == pytest.approx(0.5)
    assert np.isnan(scores_of(rows[:1], config).share_of_own_gain("law", "mixture"))


def test_own_expert_that_gains_nothing_recovers_nothing_to_speak_of():
    rows = [
        {"domain": "law", "method": method, "metric": "loss", "value": value}
        for method, value in {"base": 2.0, "expert:law": 2.0, "mixture": 1.5}.items()
    ]
    assert np.isnan(scores_of(rows, {}).share_of_own_gain("law", "mixture"))


def test_gain_map_holds_nats_and_shares_and_folds_experts_that_were_not_crossed(make_run):
    run = read_run(make_run())
    heat_map = gain_map(scores_of(run.evaluation, run.config))
    assert list(heat_map.columns) == ["law", "chess", "code", "uniform", "mixture"]
    assert heat_map.values[0] == pytest.approx([1.0, -0.4, -0.4, 0.1, 0.9])
    assert list(heat_map.texts[1]) == ["+0.10", "+2.00", "+0.10", "+0.50", "+2.10"]
    rows = [row for row in run.evaluation if row["method"] in ("base", f"expert:{row['domain']}", "mixture")]
    folded = gain_map(scores_of(rows, run.config))
    assert list(folded.columns) == ["own expert", "mixture"]
    assert gain_map(scores_of([row for row in rows if row["method"] == "base"], run.config)) is None


def test_routers_are_grouped_by_the_layer_in_their_path(make_run):
    routing = read_run(make_run()).routing
    names, own_LG = by_layer(routing, routing.own_first)
    assert names == ["layer 0", "layer 1", "layer 2"]
    assert own_LG[:, 0] == pytest.approx([0.4, 0.7, 0.9])


def test_long_curves_are_thinned_to_means_and_gaps_stay():
    x, y = np.arange(10_000.0), np.arange(10_000.0)
    y[:100] = np.nan
    thin_x, thin_y = thin(x, y, 100)
    assert len(thin_x) == 100 and np.isnan(thin_y[0])
    assert thin_y[1:] == pytest.approx(np.arange(149.5, 10_000, 100))
    assert thin_x == pytest.approx(np.arange(49.5, 10_000, 100))
    svg = as_svg(line_figure([Curve("loss", x, y, noisy=True)], title="t", unit="u"))
    assert len(svg) < 60_000


def test_running_mean_equals_a_loop_and_skips_what_is_no_number():
    y = np.array([1.0, np.nan, 4.0, 7.0, np.nan, np.nan, np.nan, 2.0])
    expected = []
    for index in range(len(y)):
        window = y[max(0, index - 2) : index + 1]
        expected.append(np.nanmean(window) if np.isfinite(window).any() else np.nan)
    assert running_mean(y, 3) == pytest.approx(expected, nan_ok=True)


def test_elements_escape_text_and_attributes():
    assert tag("a", "<b>", tag("i", "x"), class_='"', title=None) == '<a class="&quot;">&lt;b&gt;<i>x</i></a>'


def test_command_writes_page_and_picture_and_says_where(make_run, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    report_command.add_parser(parser.add_subparsers())
    picture = tmp_path / "pictures" / "result.png"
    args = parser.parse_args(["report", str(make_run()), "--picture", str(picture), "--json"])
    assert report_command.run(args) == 0
    written = json.loads(capsys.readouterr().out)
    assert Path(written["report"]).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert Path(written["picture"]).read_bytes().startswith(b"\x89PNG")


def test_picture_is_wide_and_needs_an_evaluation(make_run, tmp_path):
    path = result_picture(make_run(), tmp_path / "result.png")
    width, height = (int.from_bytes(path.read_bytes()[start : start + 4], "big") for start in (16, 20))
    assert width > 1000 and width > 1.5 * height
    with pytest.raises(UserError, match=r"evaluation\.json"):
        result_picture(make_run("metrics.jsonl", name="bare"), tmp_path / "none.png")
    with pytest.raises(UserError, match=r"routing\.json"):
        result_picture(make_run("evaluation.json", name="unrouted"), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
