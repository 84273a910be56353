"""Texts token by token, placement and memory, commands and older folders: what stands in these parts."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from dsmixer.config.errors import UserError
from dsmixer.report.page import build_report
from dsmixer.report.parts.again import commands_of
from dsmixer.report.parts.placement import placement
from dsmixer.report.parts.texts import texts
from dsmixer.report.run_folder import read_run


def plain(markup: str) -> str:
    """The text of some markup."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", markup))


def changed(path, **values):
    """A JSON file with other values at its top."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_each_token_stands_over_the_letter_of_its_expert_in_one_colour_a_page(make_run):
    markup = texts(read_run(make_run()))
    letters = dict(re.findall(r'<b class="chip (e\d)">([A-Z])</b><span class="name">', markup))
    assert sorted(letters.values()) == ["A", "B", "C"]
    articles = markup.split("<article>")[1:]
    assert len(articles) == 6
    for number, article in enumerate(articles):
        own = f"e{number // 2}"  # two texts a domain, the own expert loudest everywhere
        leaders = re.findall(r'<details class="token (e\d)" name="token" style="--w:0.75">', article)
        assert leaders == [own, own]
        shown = re.findall(r'<span class="piece">([^<]*)</span><i>(.)</i>', article)
        assert shown == [("Sue", letters[own]), (" said⏎yes", letters[own]), ("&lt;/s&gt;", "–")]
        assert "own expert leads 2 of 3 tokens" in article and "tokens 8 to 10 of 40" in article
        assert re.findall(r'<td class="number">([\d.]+)</td>', article) == ["0.75", "0.25"] * 2
        strip = re.findall(
            r'<li class="(e\d)" style="--w:([\d.]+)"><span>(\d)</span> (. \.\d+)</li>', article
        )
        assert strip == [(own, "0.75", layer, f"{letters[own]} .75") for layer in "01"] * 2


def test_a_run_without_texts_has_no_part_of_them(make_run):
    folder = make_run("metrics.jsonl", "evaluation.json")
    assert texts(read_run(folder)) == ""
    assert 'href="#texts"' not in build_report(folder).read_text()


@pytest.mark.parametrize("value", [[{"domain": "law"}], [{"tokens": 3}], 5])
def test_damaged_texts_are_named(make_run, value):
    folder = make_run()
    changed(folder / "examples.json", texts=value)
    with pytest.raises(UserError, match=r"examples\.json"):
        build_report(folder)


def test_an_expert_that_is_not_there_is_no_text_of_this_run(make_run):
    folder = make_run()
    path = folder / "examples.json"
    path.write_text(path.read_text().replace("[[0, 0.75]", "[[3, 0.75]"))
    with pytest.raises(UserError, match="expert 3 of 3"):
        build_report(folder)


def test_an_older_routing_file_has_its_figures_and_no_others(make_run):
    folder = make_run()
    path = folder / "routing.json"
    kept = json.loads(path.read_text())
    del kept["own_probability"], kept["entropy"]
    path.write_text(json.dumps(kept))
    page = build_report(folder).read_text()
    for title, is_there in (
        ("First expert of a token, by domain", True),
        ("First expert of a token, by layer", True),
        ("Own expert first, by layer and domain", True),
        ("Probability of the own expert", False),
        ("Entropy of a token, by layer", False),
    ):
        assert (f'aria-label="{title}' in page) == is_there, title


def test_memory_is_shown_by_kind_and_stage_beside_what_was_measured(make_run):
    folder = make_run()
    told = plain(placement(read_run(folder)))
    assert "experts 123.46 kB 123.46 kB" in told and "peak, at any time 7.20 MB 7.20 MB" in told
    assert "routers — 4.10 kB" in told and "no peak was measured" in told
    assert "gradients 123.46 kB 123.46 kB" in told and "tokens" not in told
    rows = [json.dumps({"stage": 1, "step": step, "peak_memory": step * 10**6}) for step in (1, 3, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    told = plain(placement(read_run(folder)))
    assert "peak, measured 3.00 MB —" in told and "no peak was measured" not in told


def test_a_plan_of_another_form_is_passed_over(make_run):
    folder = make_run()
    (folder / "plan.json").write_text(
        '{"bytes_per_rank": [1], "places": 3, "notes": ["<b>"], "mode": "weights"}'
    )
    told = placement(read_run(folder))
    assert "&lt;b&gt;" in told and "weights" in told and "<table" not in told


def test_commands_are_of_the_ranks_and_the_name_of_the_run_and_can_be_pasted(make_run):
    folder = make_run(name="a run; rm -rf $HOME")
    train, evaluate, report = (shlex.split(line) for line in commands_of(read_run(folder)))
    assert train == [
        *("deepspeed", "--num_accelerators", "2", "launch/train.py", "--config"),
        f"{folder}/config.yaml",
        "run.name=three_domains_again",
    ]
    assert evaluate == ["dsmixer", "evaluate", "runs/three_domains_again"]
    assert report == ["dsmixer", "report", "runs/three_domains_again"]
    changed(folder / "plan.json", world_size=16, ranks_per_node=8)
    assert shlex.split(commands_of(read_run(folder))[0])[:3] == ["deepspeed", "--hostfile", "HOSTFILE"]
    changed(folder / "plan.json", world_size=1)
    assert shlex.split(commands_of(read_run(folder))[0])[:3] == ["dsmixer", "train", "--config"]


def test_the_whole_configuration_and_the_versions_of_the_run_are_on_the_page(make_run):
    folder = make_run()
    state = folder / "checkpoints" / "stage2" / "step-00000030" / "state.json"
    for step, version in (("step-00000010", "1.0"), ("step-00000030", "2.13.0")):
        state = folder / "checkpoints" / "stage2" / step / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"versions": {"torch": version}}))
    (folder / "checkpoints" / "stage2" / "step-00000040").mkdir()
    (folder / "checkpoints" / "stage2" / "step-00000040" / "state.json").write_text("{")
    page = build_report(folder).read_text()
    assert "<dt>torch</dt><dd>2.13.0</dd>" in page and "<dt>Seed</dt><dd>7</dd>" in page
    folded = re.search(r"<details class=\"folded\">.*?<code>(.*?)</code>", page, re.DOTALL)
    assert folded and folded[1] == (folder / "config.yaml").read_text()
