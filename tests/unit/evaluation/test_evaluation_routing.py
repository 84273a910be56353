"""The routing report against counts made by hooks on the routers, and the written files."""

from __future__ import annotations

import io
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dsmixer.config.errors import UserError
from dsmixer.evaluation.methods import evaluate_mixture, routed_as
from dsmixer.evaluation.routing_analysis import Firsts, routing_report
from dsmixer.evaluation.sheet import make_sheet
from dsmixer.evaluation.table import metric_table, print_evaluation, write_evaluation, write_json

SETTINGS = SimpleNamespace(max_examples=None, generate_max_new_tokens=8, exact_match=False, batch_size=4)


def keep(seen, path, _module, _inputs, logits):
    seen[path] = logits


def plain_counts(mixture, tokenizer, domains):
    """First choices of every router by (path, domain), one example at a time, read from its logits."""
    counts, entropies = {}, {}
    for domain in (domain for domain in domains if domain.test):
        for example in domain.test:
            ids = tokenizer(example.prompt + example.completion, add_special_tokens=False)["input_ids"]
            seen = {}
            hooks = [
                router.register_forward_hook(partial(keep, seen, path))
                for path, router in mixture.routers.items()
            ]
            with torch.no_grad(), routed_as(mixture.model, "mixture"):
                mixture.model(input_ids=torch.tensor([[*ids, tokenizer.eos_token_id]]))
            for hook in hooks:
                hook.remove()
            for path, logits in seen.items():
                p = logits.double().softmax(1)
                key = (path, domain.name)
                counts.setdefault(key, []).extend(p.argmax(1).tolist())
                entropies.setdefault(path, []).extend((-(p * p.log()).sum(1)).tolist())
    return counts, entropies


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
def test_first_choices_are_counted_by_router_and_domain(router, make_mixture, tokenizer, domains):
    mixture = make_mixture(
        targets=["q", "k", "o"], experts=["sums", "taste", "spare"], rank=4, router=router, top_k=2
    )
    routing = evaluate_mixture(mixture.model, tokenizer, domains, SETTINGS)["routing"]
    counts, entropies = plain_counts(mixture, tokenizer, domains)
    assert routing["routers"] == list(mixture.routers) and routing["domains"] == ["sums", "taste", "odd"]
    for m, path in enumerate(routing["routers"]):
        assert routing["entropy"][m] == pytest.approx(sum(entropies[path]) / len(entropies[path]), rel=1e-4)
        for g, domain in enumerate(routing["domains"]):
            firsts = counts[path, domain]
            shares = [firsts.count(e) / len(firsts) for e in range(3)]
            assert routing["load"][m][g] == pytest.approx(shares)
            own = {"sums": shares[0], "taste": shares[1], "odd": None}[domain]
            assert routing["own_first_share"][m][g] == (own if own is None else pytest.approx(own))
    later = [m for m, path in enumerate(routing["routers"]) if ".layers.1." in path]
    mean = sum(routing["own_first_share"][m][0] for m in later) / len(later)
    assert routing["summary"]["own_first_later_layers"]["sums"] == pytest.approx(mean)
    both = routing["summary"]["own_first_later_layers"]
    assert routing["summary"]["own_first_later_layers_mean"] == pytest.approx(sum(both.values()) / 2)


def test_the_own_share_is_known_where_the_whole_table_is_too_large(mixture, tokenizer, domains, monkeypatch):
    whole = evaluate_mixture(mixture.model, tokenizer, domains, SETTINGS)["routing"]
    monkeypatch.setattr("dsmixer.routing.statistics.MAX_DOMAIN_CELLS", 8)
    part = evaluate_mixture(mixture.model, tokenizer, domains, SETTINGS)["routing"]
    assert "load" in whole and "load" not in part
    assert part["own_first_share"] == whole["own_first_share"]


def test_what_a_router_saw_no_tokens_of_is_null_and_counts_in_no_mean(mixture, tokenizer, domains):
    """Three routers in two layers: the first saw nothing of the domain sums, the second nothing at all."""
    sheet = make_sheet(domains, tokenizer, max_length=96, max_examples=None)
    num = len(mixture.routers)
    own_MG4 = torch.tensor([10.0, 4.0, 5.0, 6.0]).repeat(num, 3, 1).double()  # tokens, first, entropy, p
    domain_MGE = torch.tensor([4.0, 6.0, 0.0]).repeat(num, 3, 1)
    for values in (own_MG4, domain_MGE):
        values[0, 0], values[1] = 0, 0
    routing = routing_report(mixture, sheet, own_MG4, Firsts(domain_MGE.sum(1), domain_MGE))
    written = json.loads(json.dumps(routing, allow_nan=False))
    assert written["own_first_share"][:3] == [[None, 0.4, None], [None] * 3, [0.4, 0.4, None]]
    assert written["own_probability"][:3] == [[None, 0.6, None], [None] * 3, [0.6, 0.6, None]]
    assert written["load"][0][0] == [None] * 3 and written["load"][0][1] == pytest.approx([0.4, 0.6, 0.0])
    assert written["expert_load"][1] == [None] * 3 and written["entropy"][:3] == [0.5, None, 0.5]
    summary = written["summary"]
    assert summary["entropy"] == pytest.approx(0.5) and summary["own_first"] == pytest.approx(
        {"sums": 0.4, "taste": 0.4}
    )
    assert summary["own_first_mean"] == pytest.approx(0.4)


def test_the_files_of_a_run_are_what_the_report_reads(mixture, tokenizer, domains, tmp_path):
    result = evaluate_mixture(mixture.model, tokenizer, domains, SETTINGS)
    write_evaluation(tmp_path, result)
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert all(set(row) == {"domain", "method", "metric", "value", "num_examples"} for row in rows)
    routing = json.loads((tmp_path / "routing.json").read_text())
    assert len(routing["load"]) == len(routing["routers"]) == len(mixture.routers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "routing.json"]


def test_the_table_shows_every_value_and_the_recovered_share(mixture, tokenizer, domains):
    result = evaluate_mixture(mixture.model, tokenizer, domains, SETTINGS)
    out = io.StringIO()
    print_evaluation(result, Console(file=out, width=200))
    text = out.getvalue()
    for row in result["rows"]:
        assert row["domain"] in text and row["method"] in text and f"{row['value']:.4f}" in text
    shares = [share for share in result["recovered"].values() if share is not None]
    assert shares and all(f"{share:.1%}" in text for share in shares)
    assert "own expert first" in text


def test_many_experts_share_one_column():
    methods = ["base", *(f"expert:{i}" for i in range(9)), "uniform", "mixture"]
    rows = [{"domain": "3", "method": m, "metric": "loss", "value": float(i)} for i, m in enumerate(methods)]
    table = metric_table({"rows": rows, "recovered": {"3": 0.5}}, "loss")
    assert [column.header for column in table.columns] == [
        "domain",
        "base",
        "own expert",
        "uniform",
        "mixture",
        "recovered",
    ]
    assert list(table.columns[2].cells) == ["4.0000"]


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "file" / "result.json", {})
