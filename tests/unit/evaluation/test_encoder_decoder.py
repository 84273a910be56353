"""Scores, written answers and routing of an encoder-decoder mixture, against T5's own loss and loops."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.tiny import CONFIGS, byte_tokenizer
from transformers import AutoModelForSeq2SeqLM

from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.cli.main import main
from dsmixer.config.schema import EvaluationConfig
from dsmixer.data.collate import collate
from dsmixer.evaluation.generation import greedy_config, padded_prompts
from dsmixer.evaluation.methods import evaluate_mixture, routed_as
from dsmixer.evaluation.sheet import make_sheet
from dsmixer.model.inject import attach_mixers, route_to
from dsmixer.model.mixer_config import MixerConfig

METHODS = ["base", "expert:sums", "expert:taste", "expert:spare", "uniform", "mixture"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def t5_tokenizer():
    return byte_tokenizer(ends=True)


@pytest.fixture
def t5(stir):
    """In float64, so that what differs by more than rounding shows."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS["flan"](), dtype=torch.float32).eval()
    config = MixerConfig(targets="qkvo", experts=["sums", "taste", "spare"], rank=4, alpha=8, compute="loop")
    mixture = stir(attach_mixers(model, config))
    mixture.model.double()
    return mixture


def encoded(tokenizer, text):
    return tokenizer(text, return_tensors="pt")["input_ids"]


@torch.no_grad()
def loss_of(model, tokenizer, prompt, completion):
    """T5's own loss of one pair by itself: mean over the completion and its end, and their number."""
    labels = encoded(tokenizer, completion)
    return model(input_ids=encoded(tokenizer, prompt), labels=labels).loss.item(), labels.shape[1]


@torch.no_grad()
def written_by(model, tokenizer, prompt, num):
    """One token after the other without a cache, each from a full forward pass."""
    read, ids = encoded(tokenizer, prompt), torch.tensor([[0]])
    for _ in range(num):
        best = model(input_ids=read, decoder_input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        if int(best) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best[:, None]], dim=1)
    return tokenizer.decode(ids[0, 1:], skip_special_tokens=True)


def plain_scores(model, tokenizer, domain, num):
    sums, counts, hits, matches = 0.0, 0, [], []
    for example in domain.test:
        loss, count = loss_of(model, tokenizer, example.prompt, example.completion)
        sums, counts = sums + loss * count, counts + count
        if example.choices is None:
            text = written_by(model, tokenizer, example.prompt, num)
            matches.append(text.strip() == example.completion.strip())
            continue
        nll = []
        for choice in example.choices:
            loss, count = loss_of(model, tokenizer, example.prompt, choice)
            labels = encoded(tokenizer, choice)
            with torch.no_grad():
                logits = model(input_ids=encoded(tokenizer, example.prompt), labels=labels).logits
            end = -torch.log_softmax(logits[0, -1], 0)[tokenizer.eos_token_id].item()
            nll.append(loss * count - end)
        hits.append(nll.index(min(nll)) == example.answer)
    found = {"loss": sums / counts}
    if hits:
        found["accuracy"] = sum(hits) / len(hits)
    if matches:
        found["exact_match"] = sum(matches) / len(matches)
    return found


def test_every_method_scores_as_t5s_own_loss_of_each_example_alone(t5, t5_tokenizer, domains):
    """Rows of unlike lengths in one batch, padded on both sides; written answers too."""
    domains = [replace(domain, test=domain.test[:4]) for domain in domains]
    settings = EvaluationConfig(batch_size=5, generate_max_new_tokens=3)
    result = evaluate_mixture(t5.model, t5_tokenizer, domains, settings)
    found = {
        (r["domain"], r["method"], r["metric"]): r["value"]
        for r in result["rows"]
        if r["method"] != "majority" and r["metric"] != "accuracy_norm"
    }
    wanted = {}
    for method in METHODS:
        for domain in (domain for domain in domains if domain.test):
            with routed_as(t5.model, method):
                values = plain_scores(t5.model, t5_tokenizer, domain, 3)
            wanted |= {(domain.name, method, metric): value for metric, value in values.items()}
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-9)
    assert len({found["sums", method, "loss"] for method in METHODS}) == len(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_a_padded_batch_gives_each_row_the_logits_that_it_has_alone(method, t5, t5_tokenizer, domains):
    sheet = make_sheet(domains, t5_tokenizer, max_length=64, max_examples=None, decoder_start=0)
    rows = [0, 12, 13, len(sheet.store) - 1]
    batch = collate(sheet.store, [(row,) for row in rows[:2]] + [()] + [(row,) for row in rows[2:]], 0)
    with routed_as(t5.model, method), torch.no_grad():
        together = t5.model(**batch.inputs()).logits[[0, 1, 3, 4]]
        for logits, row in zip(together, rows, strict=True):
            alone = collate(sheet.store, [(row,)], 0)
            expected = t5.model(**alone.inputs()).logits[0]
            torch.testing.assert_close(logits[: len(expected)], expected, rtol=1e-9, atol=1e-9)
    assert bool(together.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_written_as_each_prompt_alone_without_a_cache(method, t5, t5_tokenizer):
    """The encoder runs once, the decoder token by token on its cache."""
    prompts = ["a", "a longer prompt", "2+2="]
    given = padded_prompts(t5.model, [t5_tokenizer(p)["input_ids"] for p in prompts], 0, CPU)
    assert given.written_from == 1 and given.input_ids[0, -1] == 0
    with routed_as(t5.model, method):
        output = t5.model.generate(
            given.input_ids,
            attention_mask=given.attention_mask,
            generation_config=greedy_config(t5.model, t5_tokenizer, 6, 0),
        )
        texts = t5_tokenizer.batch_decode(output[:, 1:], skip_special_tokens=True)
        assert texts == [written_by(t5.model, t5_tokenizer, prompt, 6) for prompt in prompts]


def test_routing_is_counted_over_the_tokens_that_each_router_sees(t5, t5_tokenizer, domains):
    """Of one projection in the encoder and one in the decoder, against a loop over examples by hand."""
    counted = [domain for domain in domains if domain.test and domain.name != "odd"]
    result = evaluate_mixture(t5.model, t5_tokenizer, counted, EvaluationConfig(exact_match=False))
    routing = result["routing"]
    for path in ("encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.k"):
        assert t5.mixers[path].stream == "encoder"
    paths = [
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.k",
        "decoder.block.1.layer.1.EncDecAttention.q",
    ]
    for path in paths:
        router, kept = t5.routers[path], []
        handle = router.register_forward_hook(lambda module, inputs, out, kept=kept: kept.append(out))
        for g, domain in enumerate(counted):
            kept.clear()
            for example in domain.test:
                with routed_as(t5.model, "mixture"):
                    loss_of(t5.model, t5_tokenizer, example.prompt, example.completion)
            first = torch.cat(kept).argmax(1)
            share = (first == t5.expert_names.index(domain.expert)).double().mean().item()
            assert routing["own_first_share"][routing["routers"].index(path)][g] == pytest.approx(share)
        handle.remove()


@pytest.mark.parametrize(
    ("flags", "expert"), [([], "routers"), (["--expert", "taste"], "taste"), (["--base"], None)]
)
def test_the_command_writes_what_the_decoder_writes(flags, expert, t5, t5_tokenizer, tmp_path, capsys):
    """From a saved mixture: the prompt goes to the encoder, and no part of it comes out."""
    state = {k: v for k, v in t5.model.state_dict().items() if ".bank." not in k and ".router." not in k}
    base = type(t5.model)(t5.model.config)
    base.load_state_dict({key.replace(".base.", "."): value for key, value in state.items()})
    base.save_pretrained(tmp_path / "base")
    save_mixture(t5, tmp_path / "mixture", tokenizer=t5_tokenizer, base=str(tmp_path / "base"))
    arguments = ["generate", str(tmp_path / "mixture"), "--prompt", "4 + 4", "--max-new-tokens", "5", *flags]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    if expert == "routers":
        wanted = written_by(t5.model, t5_tokenizer, "4 + 4", 5)
    else:
        with route_to(t5.model, expert):
            wanted = written_by(t5.model, t5_tokenizer, "4 + 4", 5)
    assert (wanted or expert is None) and answer["text"] == wanted, "this base ends at once"
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == wanted.strip()
