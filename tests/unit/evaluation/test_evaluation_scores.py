"""Scores against a plain loop over examples with the loss that transformers computes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dsmixer.data.domains import Domain
from dsmixer.data.records import Example
from dsmixer.evaluation.generation import match_rows
from dsmixer.evaluation.methods import evaluate_mixture, methods_of, routed_as
from dsmixer.evaluation.sheet import make_sheet
from dsmixer.model.inject import route_by, route_to
from dsmixer.routing.modes import Routing


def settings(**changes):
    values = {"max_examples": None, "generate_max_new_tokens": 12, "exact_match": True, "batch_size": 4}
    return SimpleNamespace(**{**values, **changes})


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def nll(model, prompt, completion):
    """Minus log-likelihood of the completion by transformers' own loss: one example, no padding."""
    ids = torch.tensor([prompt + completion])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss.double()) * len(completion)


def plain_scores(model, tokenizer, domain):
    """Loss, accuracy and accuracy per byte of a domain, example by example."""
    end = [tokenizer.eos_token_id]
    total, count, by_sum, by_byte = 0.0, 0, [], []
    for example in domain.test:
        prompt = ids_of(tokenizer, example.prompt)
        completion = ids_of(tokenizer, example.completion) + end
        total += nll(model, prompt, completion)
        count += len(completion)
        if example.choices:
            sums = [nll(model, prompt, ids_of(tokenizer, choice)) for choice in example.choices]
            per_byte = [s / len(c.encode()) for s, c in zip(sums, example.choices, strict=True)]
            by_sum.append(sums.index(min(sums)) == example.answer)
            by_byte.append(per_byte.index(min(per_byte)) == example.answer)
    mean = {"loss": total / count}
    if by_sum:
        mean |= {"accuracy": sum(by_sum) / len(by_sum), "accuracy_norm": sum(by_byte) / len(by_byte)}
    return mean


def route_of(model, method):
    if method == "uniform":
        return route_by(model, Routing(mode="uniform"))
    if method == "mixture":
        return route_by(model, Routing(mode="topk", top_k=3))
    return route_to(model, None if method == "base" else method.removeprefix("expert:"))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_method_scores_as_a_loop_over_examples(batch_size, mixture, tokenizer, domains):
    result = evaluate_mixture(
        mixture.model, tokenizer, domains, settings(batch_size=batch_size, exact_match=False)
    )
    found = {(r["domain"], r["method"], r["metric"]): r["value"] for r in result["rows"]}
    methods = ["base", "expert:sums", "expert:taste", "expert:spare", "uniform", "mixture"]
    wanted = {}
    for method in methods:
        for domain in (domain for domain in domains if domain.test):
            with route_of(mixture.model, method):
                values = plain_scores(mixture.model, tokenizer, domain)
            wanted |= {(domain.name, method, metric): value for metric, value in values.items()}
    majority = found.pop(("taste", "majority", "accuracy"))
    assert majority == pytest.approx(4 / 7)
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-5)
    losses = {found["sums", method, "loss"] for method in methods}
    assert len(losses) == len(methods), "each method answers something else"


def test_the_two_accuracies_can_differ(mixture, tokenizer):
    """A long choice loses by its sum and wins per byte: the two ways must not be one."""
    choices = ("e" * 30, "q")
    example = Example("a:", choices[0], "d", choices, 0, "d:0")
    domain = Domain("d", "sums", 1.0, [example], [example])
    wanted = plain_scores(mixture.model, tokenizer, domain)
    result = evaluate_mixture(mixture.model, tokenizer, [domain], settings())
    found = {r["metric"]: r["value"] for r in result["rows"] if r["method"] == "mixture"}
    assert found == pytest.approx(wanted, rel=1e-5) and "exact_match" not in found
    sums = [nll(mixture.model, ids_of(tokenizer, "a:"), ids_of(tokenizer, choice)) for choice in choices]
    assert sums[0] > sums[1] and sums[0] / 30 < sums[1], "the case does not tell the two apart"
    assert (found["accuracy"], found["accuracy_norm"]) == (0.0, 1.0)


def test_recovered_share_is_the_mixtures_part_of_the_own_experts_gain(mixture, tokenizer, domains):
    result = evaluate_mixture(mixture.model, tokenizer, domains, settings(exact_match=False))
    loss = {(r["domain"], r["method"]): r["value"] for r in result["rows"] if r["metric"] == "loss"}
    assert set(result["recovered"]) == {"sums", "taste"}, "odd has no expert of its own"
    for name, share in result["recovered"].items():
        base, own, mixed = (loss[name, m] for m in ("base", f"expert:{name}", "mixture"))
        if base > own:
            assert share == pytest.approx((base - mixed) / (base - own))
        else:
            assert share is None


def test_evaluation_changes_neither_mode_nor_routing(mixture, tokenizer, domains):
    mixture.model.train()
    before = mixture.context.routing
    evaluate_mixture(mixture.model, tokenizer, domains, settings())
    assert mixture.model.training and mixture.context.routing is before
    assert mixture.context.batch.mask_T is None


def test_above_sixteen_experts_each_is_scored_on_its_own_domain_only(make_mixture, tokenizer, domains):
    names = ["sums", "taste", *(f"other-{i}" for i in range(15))]
    mixture = make_mixture(targets=["q"], experts=names, rank=2)
    result = evaluate_mixture(mixture.model, tokenizer, domains, settings(exact_match=False))
    experts = {(r["domain"], r["method"]) for r in result["rows"] if r["method"].startswith("expert:")}
    assert experts == {("sums", "expert:sums"), ("taste", "expert:taste")}
    assert {r["domain"] for r in result["rows"] if r["method"] == "mixture"} == {"sums", "taste", "odd"}


def test_capped_examples_are_the_same_every_time_and_spread(mixture, tokenizer, domains):
    sheets = [make_sheet(domains, tokenizer, max_length=64, max_examples=4, seed=s) for s in (0, 0, 1)]
    first, again, other = ([e.location for e in sheet.examples] for sheet in sheets)
    assert first == again != other and len(first) == 4 + 4 + 2


def test_a_completion_longer_than_the_limit_is_scored_on_what_is_kept(mixture, tokenizer):
    example = Example("p" * 50, "c" * 50, "d", location="d:0")
    sheet = make_sheet([Domain("d", "d", 1.0, [], [example])], tokenizer, max_length=16, max_examples=None)
    assert int(sheet.store.lengths[0]) == 16 and int(sheet.store.target_counts[0]) >= 8


def plain_greedy(model, tokenizer, prompt, max_new_tokens):
    """Greedy text, one token at a time, without cache or padding."""
    ids = ids_of(tokenizer, prompt)
    start = len(ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_exact_match_finds_what_greedy_writing_gives_and_nothing_else(mixture, tokenizer):
    """Half of the answers are what the model writes itself; the others differ late."""
    prompts = ["a", "4 + 4", "some longer prompt of words", "Größe:", "0", "zz top"]
    with routed_as(mixture.model, "mixture"):
        texts = [plain_greedy(mixture.model, tokenizer, prompt, 10) for prompt in prompts]
    assert all(texts)
    answers = [f" {text}" if i % 2 else f" {text[:-1]}#" for i, text in enumerate(texts)]
    examples = [
        Example(p, a, "d", location=f"d:{i}") for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    sheet = make_sheet([Domain("d", "d", 1.0, [], examples)], tokenizer, max_length=80, max_examples=None)
    for batch_size in (1, 4):
        with routed_as(mixture.model, "mixture"):
            matched = match_rows(
                mixture.model,
                tokenizer,
                sheet,
                range(len(examples)),
                batch_size=batch_size,
                max_new_tokens=10,
                pad_token_id=0,
            )
        assert matched == {i: bool(i % 2) for i in range(len(examples))}


def test_a_prompt_that_fills_the_models_positions_is_no_error(mixture, tokenizer):
    examples = [Example("p" * 95, " c", "d", location="d:0"), Example("q", " c", "d", location="d:1")]
    domain = Domain("d", "sums", 1.0, examples, examples)
    result = evaluate_mixture(mixture.model, tokenizer, [domain], settings(), max_length=96)
    assert all(math.isfinite(r["value"]) for r in result["rows"])


def test_methods_come_in_a_fixed_order(mixture, tokenizer, domains):
    sheet = make_sheet(domains, tokenizer, max_length=64, max_examples=None)
    names = [method.name for method in methods_of(mixture, sheet)]
    assert names == ["base", "expert:sums", "expert:taste", "expert:spare", "uniform", "mixture"]


def test_progress_counts_up_to_its_total(mixture, tokenizer, domains):
    seen = []
    evaluate_mixture(
        mixture.model, tokenizer, domains, settings(), progress=lambda *event: seen.append(event)
    )
    last = {method: (done, total) for method, done, total in seen}
    assert list(last) == ["base", "expert:sums", "expert:taste", "expert:spare", "uniform", "mixture"]
    assert all(done == total for done, total in last.values())
