"""Two real gloo processes score as one does, plainly and inside DeepSpeed engines, ZeRO-3 included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import scoring_ranks
from support.launching import launch
from support.scoring_ranks import domains_for, evaluate, wide_mixture
from support.tiny import byte_tokenizer


def written_texts() -> list[str]:
    """What the mixture writes itself for the first prompts, so that some answers match exactly."""
    model, tokenizer = wide_mixture().model.eval(), byte_tokenizer()
    texts = []
    for example in domains_for([])[0].test[:3]:
        ids = torch.tensor([tokenizer(example.prompt, add_special_tokens=False)["input_ids"]])
        for _ in range(6):
            with torch.no_grad():
                best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
        texts.append(tokenizer.decode(ids[0, len(example.prompt) :], skip_special_tokens=True))
    return texts


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """What each of two ranks found, and what this one process finds."""
    folder, texts = tmp_path_factory.mktemp("scoring"), written_texts()
    (folder / "texts.json").write_text(json.dumps(texts))
    launch(Path(scoring_ranks.__file__), [str(folder)], ranks=2).check()
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return found, evaluate(wide_mixture().model, texts)


@pytest.mark.parametrize("how", ["plain", "zero2", "zero3"])
def test_two_processes_give_the_scores_of_one(how, evaluations):
    found, alone = evaluations
    for result in (rank[how] for rank in found):
        assert len(result["rows"]) == len(alone["rows"])
        for got, want in zip(result["rows"], alone["rows"], strict=True):
            assert got == {**want, "value": pytest.approx(want["value"], rel=1e-6)}
        assert result["recovered"].keys() == alone["recovered"].keys()
        for got, want in zip(result["recovered"].values(), alone["recovered"].values(), strict=True):
            assert got is want is None or got == pytest.approx(want, rel=1e-4)
        assert result["routing"]["load"] == alone["routing"]["load"]
        assert result["routing"]["own_first_share"] == alone["routing"]["own_first_share"]
        assert result["texts"] and heard(result) == pytest.approx(heard(alone), abs=2e-4)


def heard(result):
    """Every weight and entropy of every token of the kept texts, whichever rank read them, by its place."""
    found = {}
    for number, text in enumerate(result["texts"]):
        for place, token in enumerate(text["tokens"]):
            at = number, text["domain"], place, token["id"]
            found[at, "entropy"] = token["entropy"]
            found |= {(at, expert): weight for expert, weight in token["weights"]}
    return found


def test_some_answers_match_and_others_do_not(evaluations):
    rows = {(r["method"], r["metric"]): r["value"] for r in evaluations[1]["rows"] if r["domain"] == "sums"}
    assert 3 / 7 <= rows["mixture", "exact_match"] < 1.0


def test_both_ranks_end_with_the_same_result(evaluations):
    first, second = evaluations[0]
    assert first == second
