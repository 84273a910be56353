"""What a run tells its mixture's card: a picture, the settings of its stages, what is missing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import yaml

from dsmixer.config.recipe import load_recipe
from dsmixer.training.card_facts import _limits, _settings, routing_picture

ROUTING = {
    "routers": ["model.layers.0.q_proj", "model.layers.1.q_proj"],
    "experts": ["law", "chess"],
    "domains": ["law", "games"],
    "load": [[[0.75, 0.25], [0.5, 0.5]], [[1.0, 0.0], [0.25, 0.75]]],
    "own_first_share": [[0.75, 0.5], [1.0, 0.75]],
}


def test_the_picture_shows_the_load_and_is_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: r}\n")
    (tmp_path / "routing.json").write_text(json.dumps(ROUTING))
    pictures = routing_picture(tmp_path)
    assert list(pictures) == ["routing.png"] and pictures == routing_picture(tmp_path)
    pixels = matplotlib.image.imread(io.BytesIO(pictures["routing.png"]), format="png")
    assert pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20


def test_without_figures_there_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: r}\n")
    assert routing_picture(tmp_path) == {}
    uncounted = {key: value for key, value in ROUTING.items() if key != "load"}
    (tmp_path / "routing.json").write_text(json.dumps(uncounted))
    assert routing_picture(tmp_path) == {}


@pytest.fixture
def recipe(tmp_path: Path):
    def load(**sections: object):
        domains = [{"name": "law", "train": "law.jsonl"}, {"name": "games", "train": "games.jsonl"}]
        text = {"base": {"model": "org/tiny"}, "data": {"domains": domains}, **sections}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text))
        return load_recipe(tmp_path / "recipe.yaml").recipe

    return load


def test_settings_name_rates_routing_and_the_routers_loss(recipe) -> None:
    found = recipe(stage2={"learning_rate": 3e-4, "top_k": 2, "rsl": {"alpha": 0.7}})
    first, second = _settings(found.stage1, found), _settings(found.stage2, found)
    assert first["routing"] == "by domain" and "RSL" not in first and first["learning rate"] == "1e-05"
    assert second["learning rate"] == "0.0003" and second["routing"] == "topk, K=2"
    assert str(second["RSL"]).startswith("alpha 0.7, entropy weight 0.05 (specialize)")
    assert second["preserve"] == "beta 5e-05"


def test_what_was_not_done_is_among_the_limits(recipe) -> None:
    assert _limits(recipe()) == []
    evaluation = {"max_examples": 9, "exact_match": False}
    limits = " ".join(_limits(recipe(stage2={"enabled": False}, evaluation=evaluation)))
    assert (
        "choose at random" in limits and "at most 9 test examples" in limits and "Written answers" in limits
    )


def test_the_license_is_the_recipes_and_may_change_later(recipe) -> None:
    assert recipe().run.license is None and recipe(run={"license": "cc-by-4.0"}).run.license == "cc-by-4.0"
    with pytest.raises(ValueError, match="license"):
        recipe(run={"license": "mine\nbase_model: evil"})
