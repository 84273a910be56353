"""The model card: it says what is known, links what is on the hub, and says what is missing."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from dsmixer.adapters.card import model_card
from dsmixer.adapters.static import card_text, rank_note

EXPERTS = [{"name": "law", "rank": 4, "alpha": 8.0}, {"name": "chess", "rank": 6, "alpha": 3.5}]
FULL = {
    "experts": EXPERTS,
    "base": "org/tiny-1.5b",
    "targets": ["q", "v"],
    "routing": "topk, K=2",
    "license": "apache-2.0",
    "domains": [
        {"name": "law", "expert": "law", "train": 90, "test": 10},
        {"name": "games", "expert": "chess", "train": 7, "test": 0},
    ],
    "training": {
        "stage 1": {"steps": 12, "learning rate": "1e-05"},
        "stage 2": {"steps": 5, "learning rate": "0.001", "RSL": "alpha 0.1"},
    },
    "evaluation": {
        "rows": [
            {"domain": "law", "method": "base", "metric": "loss", "value": 2.5, "num_examples": 10},
            {"domain": "law", "method": "mixture", "metric": "loss", "value": 1.25, "num_examples": 10},
        ]
    },
    "pictures": ["routing.png"],
    "limits": ["Written answers were not evaluated."],
}


def test_a_full_card_says_all_that_is_known():
    card = model_card(FULL)
    for line in (
        "| law | law | 90 | 10 |",
        "| games | chess | 7 | 0 |",
        "| steps | 12 | 5 |",
        "| RSL |  | alpha 0.1 |",
        "| law | 2.5000 | 1.2500 |",
        "![Where the routers send held-out tokens](routing.png)",
        "- Not evaluated: games.",
        "- Written answers were not evaluated.",
        "[`org/tiny-1.5b`](https://huggingface.co/org/tiny-1.5b)",
    ):
        assert line in card, line


def test_the_hub_reads_license_base_and_tags():
    data = ModelCard(model_card(FULL)).data
    assert data.license == "apache-2.0" and data.base_model == "org/tiny-1.5b"
    assert data.library_name == "peft" and {"dsmixer", "peft", "lora"} <= set(data.tags)
    assert ModelCard(model_card({"experts": EXPERTS})).data.license == "other"


@pytest.mark.parametrize("base", ["/data/models/tiny", "../base", "models/tiny", ".", None])
def test_a_path_of_the_machine_is_no_hub_id(base, tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = model_card({"experts": EXPERTS, "base": base})
    assert ModelCard(card).data.base_model is None and "huggingface.co" not in card


def test_what_was_not_evaluated_is_said():
    assert "- Nothing was evaluated." in model_card({"experts": EXPERTS, "domains": FULL["domains"]})
    scored = {**FULL, "domains": FULL["domains"][:1]}
    assert "Not evaluated" not in model_card(scored)


def test_the_card_of_a_static_merge_shows_its_price_and_rank():
    facts = {
        "task": "law.jsonl",
        "base": "org/tiny",
        "num_weighed": 8,
        "num_held_out": 2,
        "rank": 600,
        "weights": {"law": 0.75, "chess": 0.25},
        "losses": {"base": 3.0, "mixture": 2.0, "static": 2.5},
        "differences": {"static": 0.125},
    }
    card = card_text(facts)
    assert "| static | 2.5000 | +0.5000 | 12.50% |" in card and "| law | 0.7500 |" in card
    assert "above 512, the largest that vLLM serves" in card and "above 512" not in rank_note(512)
