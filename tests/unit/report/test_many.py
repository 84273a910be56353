"""A run of a thousand experts over a thousand domains has a page that can be opened and read."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from dsmixer.config.yaml_text import dump_yaml
from dsmixer.report.page import build_report
from dsmixer.report.parts.score_tables import evaluation
from dsmixer.report.scores import scores_of

NUMBER = 1000
LAYERS = 32
NAMES = [f"domain_{index:04d}" for index in range(NUMBER)]


def losses() -> list[dict[str, object]]:
    """Base 2, own expert 1, mixture between: the higher the domain's number, the more of the gain it has."""
    rows = []
    for index, name in enumerate(NAMES):
        values = {"base": 2.0, f"expert:{name}": 1.0, "uniform": 1.9, "mixture": 2.0 - (index / NUMBER) ** 2}
        rows += [
            {"domain": name, "method": method, "metric": "loss", "value": value, "num_examples": 10}
            for method, value in values.items()
        ]
    return rows


def texts() -> list[dict[str, object]]:
    """As many and as long as a run writes them."""
    pairs = [[index * 7, 0.125] for index in range(8)]
    token = {"id": 1, "text": "word ", "part": "prompt", "weights": pairs, "entropy": 1.0}
    token["layers"] = [[[7, 0.5], [14, 0.25]]] * 24
    text = {"own_expert": NAMES[0], "num_tokens": 500, "begin": 3, "tokens": [token] * 80}
    return [{"domain": name, **text} for name in NAMES[:12] for _ in range(2)]


@pytest.fixture
def large_run(tmp_path):
    data = {"domains": [{"name": name, "train": f"{name}.jsonl"} for name in NAMES]}
    (tmp_path / "config.yaml").write_text(dump_yaml({"run": {"name": "large"}, "data": data}))
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": losses()}))
    routers = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(LAYERS) for name in "qkvo"]
    generator = np.random.default_rng(0)
    routing = {"routers": routers, "experts": NAMES, "domains": NAMES, "entropy": [2.0] * len(routers)}
    for key in ("own_first_share", "own_probability", "expert_load"):
        routing[key] = generator.random((len(routers), NUMBER)).round(4).tolist()
    (tmp_path / "routing.json").write_text(json.dumps(routing))
    layers = [f"layer {index}" for index in range(24)]
    counts = {"num_domains": NUMBER, "num_layers": LAYERS}
    kept = {"experts": NAMES, "layers": layers, **counts, "texts": texts()}
    (tmp_path / "examples.json").write_text(json.dumps(kept))
    rows = []
    for stage in (1, 2):
        rows += [{"stage": stage, "step": step, "loss": 2.0, "load_max": 3.0} for step in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = [{"ep_rank": rank, "experts": 4, "load_over_mean": 1.0} for rank in range(256)]
    (tmp_path / "plan.json").write_text(json.dumps({"world_size": 256, "places": places}))
    return tmp_path


def test_a_page_of_a_thousand_experts_is_bounded_and_says_what_it_leaves_out(large_run):
    page = build_report(large_run).read_text(encoding="utf-8")
    assert len(page) < 3_000_000
    for remark in (
        "Of 1000 domains the 30 that the mixture serves worst and the 30 that it serves best; 940 between",
        "64 evenly picked of 1000 domains",
        "64 largest of 1000 experts",
        "Texts of 12 evenly picked domains of 1000.",
        "24 evenly picked layers of 32. Further down without layers.",
        "and 976 more",
        "240 more in plan.json",
    ):
        assert remark in page, remark
    assert page.count('scope="row">domain_') == 60
    assert all(f'scope="row">{name}<' in page for name in NAMES[:30] + NAMES[-30:])
    mean = sum((index / NUMBER) ** 2 for index in range(NUMBER)) / NUMBER
    assert f'<td class="number">{100 * mean:.1f} %</td>' in page  # of all domains, not of those shown


def remarks(*methods, losses=lambda index: 2.0):
    """Names of the rows of the table of losses, and what stands under it, where these methods were scored."""
    rows = [
        {"domain": name, "method": method, "metric": "loss", "value": losses(index), "num_examples": 10}
        for index, name in enumerate(NAMES[:100])
        for method in methods
    ]
    markup = evaluation(scores_of(rows, {}))
    return re.findall(r'scope="row">(domain_\d+)', markup), re.findall(r'class="note">(Of .*?)</p>', markup)


def test_of_many_domains_without_a_mixture_some_are_picked_and_nobody_is_served_best():
    names, (told,) = remarks("base", "uniform")
    assert told == "Of 100 domains 60 evenly picked; 40 between them are in evaluation.json, and in the mean."
    assert len(names) == 60 and names[0] == NAMES[0] and names[-1] == NAMES[99] and names == sorted(names)


def test_of_many_domains_without_own_experts_the_mixtures_losses_say_which_are_served_worst():
    names, (told,) = remarks("base", "mixture", losses=lambda index: 1.0 + (index * 37 % 100))
    assert told.startswith(
        "Of 100 domains the 30 that the mixture serves worst and the 30 that it serves best"
    )
    worst_first = sorted(range(100), key=lambda index: -(index * 37 % 100))
    assert names == [NAMES[index] for index in worst_first[:30] + worst_first[70:]]
