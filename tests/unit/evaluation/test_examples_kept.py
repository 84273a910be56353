"""Who spoke at the tokens of held-out texts, against logits read by hooks from one text at a time."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.live_bytes import LiveBytes
from support.tiny import CONFIGS, byte_tokenizer
from transformers import AutoModelForSeq2SeqLM

from dsmixer.data.domains import Domain
from dsmixer.data.records import Example
from dsmixer.evaluation.examples import (
    HEARD_IN_LAYER,
    MAX_DOMAINS,
    MAX_TOKENS,
    TEXTS_A_DOMAIN,
    ExampleWeights,
    excerpts_of,
)
from dsmixer.evaluation.methods import evaluate_mixture, routed_as
from dsmixer.evaluation.routing_analysis import write_texts
from dsmixer.evaluation.sheet import make_sheet
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.report.held_out_texts import read_examples
from dsmixer.routing.modes import Choice
from dsmixer.routing.statistics import RouterOutput

SETTINGS = SimpleNamespace(max_examples=None, generate_max_new_tokens=8, exact_match=False, batch_size=4)


def keep(seen, path, _module, _inputs, logits):
    seen[path] = logits.detach().double()


@torch.no_grad()
def logits_of(mixture, **inputs):
    """Each router's logits for one text alone, by path."""
    seen = {}
    hooks = [r.register_forward_hook(partial(keep, seen, path)) for path, r in mixture.routers.items()]
    with routed_as(mixture.model, "mixture"):
        mixture.model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def topk_weights(logits_E, k):
    """The k likeliest, renormalised to sum 1."""
    p = logits_E.softmax(0)
    chosen = sorted(range(len(p)), key=lambda e: -p[e])[:k]
    total = sum(p[e] for e in chosen)
    return torch.tensor([float(p[e] / total) if e in chosen else 0.0 for e in range(len(p))])


def uses_of(mixture, path):
    """Projections that a router serves."""
    index = list(mixture.routers).index(path)
    return sum(mixer.router_index == index for mixer in mixture.mixers.values())


def expected_at(mixture, seen, token, k):
    """Mean weights over projections, the same by layer, and mean entropy, of one token."""
    total, layers, entropy, uses = 0, {}, 0, 0
    for path, logits in seen.items():
        n = uses_of(mixture, path)
        weights, p = topk_weights(logits[token], k), logits[token].softmax(0)
        total, uses, entropy = total + n * weights, uses + n, entropy - n * float((p * p.log()).sum())
        layers.setdefault(path.split("layers.")[-1][0], []).append((n, weights))
    means = [sum(n * w for n, w in pairs) / sum(n for n, _ in pairs) for pairs in layers.values()]
    return total / uses, means, entropy / uses


def dense(pairs, num_experts):
    found = torch.zeros(num_experts)
    for expert, weight in pairs:
        found[expert] = weight
    return found


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
def test_weights_at_each_token_are_those_of_a_pass_over_its_text_alone(
    router, make_mixture, tokenizer, domains
):
    """In batches with padding, with choices beside the right answer, in texts longer than what is kept."""
    long = [Example("y" * 70, " zz" * 20, "odd", location="odd:0")]
    domains = [*domains[:3], Domain("odd", "nobody", 1.0, long, long)]
    mixture = make_mixture(
        targets=["q", "k", "o"], experts=["sums", "taste", "spare"], rank=4, router=router, top_k=2
    )
    result = evaluate_mixture(mixture.model, tokenizer, domains, SETTINGS)
    found = result["routing"].examples.as_json(tokenizer)
    assert [text["domain"] for text in found["texts"]] == ["sums", "sums", "taste", "taste", "odd"]
    assert found["experts"] == ["sums", "taste", "spare"] and found["layers"] == ["layer 0", "layer 1"]
    examples = [*domains[0].test[:2], *domains[2].test[:2], *long]
    for text, example in zip(found["texts"], examples, strict=True):
        ids = tokenizer(example.prompt + example.completion, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        begin, tokens = text["begin"], text["tokens"]
        assert text["num_tokens"] == len(ids) and len(tokens) == min(len(ids), MAX_TOKENS)
        assert [token["id"] for token in tokens] == ids[begin : begin + len(tokens)]
        seen = logits_of(mixture, input_ids=torch.tensor([ids]))
        for place, token in enumerate(tokens, begin):
            mean, layers, entropy = expected_at(mixture, seen, place, 2)
            assert dense(token["weights"], 3).tolist() == pytest.approx(mean.tolist(), abs=2e-4)
            assert token["entropy"] == pytest.approx(entropy, abs=2e-4)
            assert token["part"] == ("prompt" if place < len(example.prompt) else "answer")
            for pairs, weights in zip(token["layers"], layers, strict=True):
                loudest = weights.topk(HEARD_IN_LAYER).values
                assert [weight for _, weight in pairs] == pytest.approx(loudest.tolist(), abs=2e-4)
    whole = "".join(token["text"] for token in found["texts"][0]["tokens"])
    assert whole.startswith(examples[0].prompt + examples[0].completion)
    assert found["texts"][-1]["begin"] == 70 - MAX_TOKENS // 2  # around the start of the answer


def test_an_encoder_reads_the_prompt_and_a_decoder_the_answer(stir, domains):
    """One text against logits by stream: tokens of the prompt from the encoder's routers and no others."""
    tokenizer = byte_tokenizer(ends=True)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS["flan"](), dtype=torch.float32).eval()
    config = MixerConfig(targets="qkvo", experts=["sums", "taste", "spare"], rank=4, alpha=8, compute="loop")
    mixture = stir(attach_mixers(model, config))
    result = evaluate_mixture(mixture.model, tokenizer, domains[:1], SETTINGS)
    found = result["routing"].examples.as_json(tokenizer)
    text, example = found["texts"][0], domains[0].test[0]
    prompt = tokenizer(example.prompt)["input_ids"]
    labels = tokenizer(example.completion)["input_ids"]
    assert [t["id"] for t in text["tokens"]] == [*prompt, 0, *labels[:-1]]
    assert [t["part"] for t in text["tokens"]] == ["prompt"] * len(prompt) + ["answer"] * len(labels)
    seen = logits_of(mixture, input_ids=torch.tensor([prompt]), labels=torch.tensor([labels]))
    sides = {"encoder": {}, "decoder": {}}
    for path, logits in seen.items():
        sides[mixture.mixers[path].stream][path] = logits
    for index, token in enumerate(text["tokens"]):
        written = index >= len(prompt)
        side = sides["decoder" if written else "encoder"]
        place = index - len(prompt) if written else index
        k = mixture.config.default_routing().top_k
        mean, _, _ = expected_at(mixture, side, place, k)
        assert dense(token["weights"], 3).tolist() == pytest.approx(mean.tolist(), abs=2e-4)
        for name, pairs in zip(found["layers"], token["layers"], strict=True):
            part, number = name.split(" layer ")
            own = {path: seen for path, seen in side.items() if path.startswith(f"{part}.block.{number}.")}
            assert bool(pairs) == bool(own)  # the encoder's tokens are read in the decoder's layers too
            loudest = expected_at(mixture, own, place, k)[0].topk(HEARD_IN_LAYER).values if own else ()
            assert [weight for _, weight in pairs] == pytest.approx([float(w) for w in loudest], abs=2e-4)


def test_probability_of_the_own_expert_and_load_are_those_of_the_logits(make_mixture, tokenizer, domains):
    mixture = make_mixture(targets=["q", "o"], experts=["sums", "taste", "spare"], rank=4, top_k=2)
    routing = evaluate_mixture(mixture.model, tokenizer, domains, SETTINGS)["routing"]
    p_own, firsts = {}, {}
    for domain in (domain for domain in domains if domain.test):
        for example in domain.test:
            ids = tokenizer(example.prompt + example.completion, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
            for path, logits in logits_of(mixture, input_ids=ids).items():
                p = logits.softmax(1)
                firsts.setdefault(path, []).extend(p.argmax(1).tolist())
                if domain.expert in mixture.expert_names:
                    own = mixture.expert_names.index(domain.expert)
                    p_own.setdefault((path, domain.name), []).extend(p[:, own].tolist())
    for m, path in enumerate(routing["routers"]):
        shares = [firsts[path].count(e) / len(firsts[path]) for e in range(3)]
        assert routing["expert_load"][m] == pytest.approx(shares)
        for g, name in enumerate(routing["domains"]):
            values = p_own.get((path, name))
            expected = None if values is None else pytest.approx(sum(values) / len(values), rel=1e-4)
            assert routing["own_probability"][m][g] == expected
    means = [row[0] for row in routing["own_probability"]]
    assert routing["summary"]["own_probability"]["sums"] == pytest.approx(sum(means) / len(means))


def test_few_texts_of_few_domains_are_kept_and_short_ones_first(tokenizer):
    def domain(index):
        pairs = [("x" * 100, " y"), ("short", " a"), ("x" * 90, " y"), ("brief", " b"), ("tiny", " c")]
        name = f"d{index}"
        test = [Example(prompt, text, name, location=f"{name}:{i}") for i, (prompt, text) in enumerate(pairs)]
        return Domain(name, name, 1.0, test, test)

    sheet = make_sheet([domain(i) for i in range(40)], tokenizer, max_length=256, max_examples=None)
    excerpts = excerpts_of(sheet)
    assert len(excerpts) == MAX_DOMAINS * TEXTS_A_DOMAIN
    names = list(dict.fromkeys(excerpt.domain for excerpt in excerpts))
    assert len(names) == MAX_DOMAINS and names[0] == "d0" and names[-1] == "d39"
    texts = {tokenizer.decode(excerpt.ids, skip_special_tokens=True) for excerpt in excerpts}
    assert texts == {"short a", "brief b"}


def bytes_while_watching(tokenizer, num_layers, num_experts):
    """The most that is held at once while the routers of a model this deep tell of a text of MAX_TOKENS."""
    names, paths = [f"e{e}" for e in range(num_experts)], [f"layers.{index}.q" for index in range(num_layers)]
    mixers = {path: SimpleNamespace(router_index=index) for index, path in enumerate(paths)}
    mixture = SimpleNamespace(
        expert_names=names, routers=paths, mixers=mixers, streams=["decoder"] * num_layers
    )
    text = [Example("x" * 40, "y" * (MAX_TOKENS - 41), "d", location="d:0")]
    sheet = make_sheet([Domain("d", "e0", 1.0, text, text)], tokenizer, max_length=96, max_examples=None)
    ids = torch.zeros(1, MAX_TOKENS, dtype=torch.long)
    micro = SimpleNamespace(input_ids=ids, example_ids=ids, encoder=None)
    p_TE = torch.rand(MAX_TOKENS, num_experts, generator=torch.Generator().manual_seed(0)).softmax(1)
    output = RouterOutput(p_TE, p_TE, Choice(*reversed(p_TE.topk(2, 1)), gate_TE=p_TE), None)
    kept = ExampleWeights(mixture, sheet)
    with LiveBytes() as live, kept.watching(micro):
        for router in range(num_layers):
            kept.record(router, output)
    return live.peak


def test_memory_while_texts_are_watched_does_not_grow_with_the_layers(tokenizer):
    size = MAX_TOKENS * 512 * 4  # float32, of one router
    few, many = (bytes_while_watching(tokenizer, number, 512) for number in (2, 64))
    assert many == few
    assert few < 8 * size


def test_the_file_is_what_the_report_reads_and_goes_where_nothing_was_watched(
    mixture, tokenizer, domains, tmp_path
):
    routing = evaluate_mixture(mixture.model, tokenizer, domains, SETTINGS)["routing"]
    write_texts(tmp_path, routing, tokenizer)
    path = tmp_path / "examples.json"
    found, read = json.loads(path.read_text()), read_examples(path)
    assert [text.domain for text in read.texts] == [text["domain"] for text in found["texts"]]
    token, told = read.texts[0].tokens[3], found["texts"][0]["tokens"][3]
    assert token.leader == told["weights"][0][0] and sum(token.weights) == pytest.approx(1, abs=1e-3)
    assert "examples" not in json.dumps(routing)
    write_texts(tmp_path, None, tokenizer)
    assert not path.exists()
