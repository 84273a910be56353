"""Methods scored in one go: beside the mixture's own evaluation, and on an encoder-decoder model."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.tiny import byte_tokenizer

from dsmixer.baselines.evaluate import evaluate_methods
from dsmixer.baselines.fitting import Fit
from dsmixer.baselines.interface import Given
from dsmixer.baselines.registry import methods
from dsmixer.baselines.rows import training_rows
from dsmixer.evaluation.methods import evaluate_mixture
from dsmixer.evaluation.sheet import make_sheet

SHORT = Fit(steps=1, batch_size=2, learning_rate=1e-3)


def shortened(names):
    """Methods by name, with one step where they train."""
    return {
        name: replace(m, fitting=SHORT) if hasattr(m, "fitting") else replace(m, steps=2) if m.trains else m
        for name in names
        if (m := methods[name])
    }


@pytest.fixture(scope="module")
def compared(make_mixture, domains, rows):
    mixture = make_mixture(experts=["sums", "words"])
    tokenizer = byte_tokenizer()
    sheet = make_sheet(domains, tokenizer, max_length=32, max_examples=None)
    given = Given(mixture, rows)
    settings = SimpleNamespace(max_examples=None, generate_max_new_tokens=3, exact_match=True, batch_size=3)
    own = evaluate_mixture(mixture.model, tokenizer, domains, settings, max_length=32)
    found = evaluate_methods(given, tokenizer, sheet, shortened(methods), batch_size=3, max_new_tokens=3)
    return found, own


def cells(rows, method):
    return {(row["domain"], row["metric"]): row for row in rows if row["method"] == method}


def test_what_both_know_is_scored_alike(compared):
    found, own = compared
    for (domain, metric), row in cells(found.rows, "uniform").items():
        assert row["value"] == pytest.approx(cells(own["rows"], "uniform")[domain, metric]["value"], rel=1e-5)
    for (domain, metric), row in cells(found.rows, "own").items():
        wanted = cells(own["rows"], f"expert:{domain}")[domain, metric]
        assert row == wanted | {"method": "own", "value": pytest.approx(wanted["value"], rel=1e-6)}


def test_every_method_has_a_row_a_domain_and_its_cost(compared):
    found, _ = compared
    for name in methods:
        assert set(cells(found.rows, name)) == {
            (domain, metric) for domain in ("sums", "words") for metric in ("loss", "exact_match")
        }
        assert all(math.isfinite(row["value"]) for row in cells(found.rows, name).values())
    assert {name for name, cost in found.costs.items() if cost["told"]} == {"own", "lorahub_per_domain"}
    trainable = {name: cost["trainable"] for name, cost in found.costs.items()}
    assert {name for name in methods if trainable[name]} == {n for n in methods if methods[n].trains}
    assert trainable["lorahub"] == 2 and trainable["lorahub_per_domain"] == 4


def test_methods_work_on_an_encoder_and_its_decoder(make_mixture, domains):
    mixture = make_mixture("flan", targets=["q", "v"], experts=["sums", "words"])
    tokenizer = byte_tokenizer(ends=True)
    sides = {"max_length": 32, "decoder_start": 0}
    rows = training_rows(domains, tokenizer, **sides)
    sheet = make_sheet(domains, tokenizer, max_examples=2, **sides)
    chosen = shortened(["arrow", "phatgoose", "mole", "mixlora", "one_lora"])
    found = evaluate_methods(Given(mixture, rows), tokenizer, sheet, chosen, batch_size=4)
    assert len(found.rows) == len(chosen) * 2
    losses = [row["value"] for row in found.rows]
    assert all(math.isfinite(loss) for loss in losses) and len(set(losses)) > len(chosen)
    assert not any(p.grad is not None for p in mixture.model.parameters())
    assert torch.is_grad_enabled()
