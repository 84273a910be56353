"""``evaluation.methods``: what is left out is not scored, and the rest is scored as it is among all."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from dsmixer.config.errors import UserError
from dsmixer.config.explain import validate_recipe
from dsmixer.evaluation.methods import evaluate_mixture
from dsmixer.evaluation.table import metric_table, write_evaluation

SETTINGS = SimpleNamespace(max_examples=2, generate_max_new_tokens=2, exact_match=False, batch_size=4)


def evaluate(mixture, tokenizer, domains, **options):
    return evaluate_mixture(mixture.model, tokenizer, domains, SETTINGS, max_length=64, **options)


def of(rows, wanted):
    return [row for row in rows if wanted(row["method"])]


@pytest.fixture
def everything(mixture, tokenizer, domains):
    return evaluate(mixture, tokenizer, domains)


@pytest.mark.parametrize(
    ("kinds", "methods"),
    [
        (["experts", "base"], {"base", "expert:sums", "expert:taste", "expert:spare"}),
        (["mixture"], {"mixture"}),
        (["uniform"], {"uniform"}),
    ],
)
def test_the_rows_are_those_of_the_chosen_among_all(
    kinds, methods, everything, mixture, tokenizer, domains
) -> None:
    found = evaluate(mixture, tokenizer, domains, kinds=kinds)
    assert found["rows"] == of(everything["rows"], lambda method: method in methods | {"majority"})
    assert found["recovered"] == {} and everything["recovered"].keys() == {"sums", "taste"}
    assert (found["routing"] is None) == ("mixture" not in methods)
    if "mixture" in methods:
        assert found["routing"] == everything["routing"]


def test_experts_before_stage_two_are_scored_under_their_own_weights(
    everything, mixture, tokenizer, domains
) -> None:
    """With the experts of two domains put in each other's place, a row before is the other one's after."""
    entered = []

    @torch.no_grad()
    def swap():
        for mixer in mixture.mixers.values():
            for weight in (mixer.bank.lora_A, mixer.bank.lora_B):
                weight[[0, 1]] = weight[[1, 0]]

    @contextmanager
    def before():
        entered.append(True)
        swap()
        yield
        swap()

    kinds = ["experts@stage1", "base"]
    found = evaluate(mixture, tokenizer, domains, kinds=kinds, stage_one=before())["rows"]
    assert entered == [True], "once for all experts"
    for name, other in (("sums", "taste"), ("taste", "sums"), ("spare", "spare")):
        got = of(found, lambda method, name=name: method == f"expert:{name}@stage1")
        wanted = of(everything["rows"], lambda method, other=other: method == f"expert:{other}")
        assert [row | {"method": ""} for row in got] == [row | {"method": ""} for row in wanted]
    assert of(found, lambda m: m == "base") == of(everything["rows"], lambda m: m == "base")


def test_a_run_folder_keeps_no_routing_of_an_evaluation_before(
    everything, mixture, tokenizer, domains, tmp_path
) -> None:
    write_evaluation(tmp_path, everything)
    assert (tmp_path / "routing.json").is_file()
    write_evaluation(tmp_path, evaluate(mixture, tokenizer, domains, kinds=["base"]))
    assert not (tmp_path / "routing.json").exists()
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"base", "majority"}


def test_a_method_that_is_not_there_is_refused_with_the_nearest() -> None:
    raw = {"base": {"model": "x"}, "data": {}, "evaluation": {"methods": ["mixtures"]}}
    with pytest.raises(UserError, match=r"evaluation\.methods") as refused:
        validate_recipe(raw, lambda key: key)
    assert "mixture" in str(refused.value)


def test_the_table_of_many_experts_has_the_own_one_before_and_after_stage_two() -> None:
    names = ["a", "b", "c", "d"]
    methods = ["base", *(f"expert:{e}{state}" for state in ("", "@stage1") for e in names)]
    rows = [
        {"domain": f"of {d}", "method": method, "metric": "loss", "value": 10.0 * i + j, "num_examples": 1}
        for i, d in enumerate(names)
        for j, method in enumerate(methods)
    ]
    table = metric_table({"rows": rows, "own_experts": {f"of {e}": e for e in names}}, "loss")
    assert [column.header for column in table.columns] == [
        "domain",
        "base",
        "own expert",
        "own expert@stage1",
    ]
    assert list(table.columns[2].cells) == ["1.0000", "12.0000", "23.0000", "34.0000"]
    assert list(table.columns[3].cells) == ["5.0000", "16.0000", "27.0000", "38.0000"]
