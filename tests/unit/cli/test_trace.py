"""The numbers of a trace: against a full forward pass, and against softmax(Gx) by hand."""

from __future__ import annotations

import pytest
import torch
from support.tiny import CONFIGS, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config

from dsmixer import MixerConfig, attach_mixers
from dsmixer.cli.trace import pieces, trace_json, trace_of, tracing

NAMES = ("law", "chess", "sums")


@torch.no_grad()
def mixed(model, targets=("q", "k", "v", "o"), **options):
    mixture = attach_mixers(
        model.eval(), MixerConfig(targets=targets, experts=NAMES, rank=4, alpha=8, router_std=0.3, **options)
    )
    for mixer in mixture.mixers.values():
        mixer.bank.lora_B.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    return mixture


def llama(**options):
    torch.manual_seed(0)
    return mixed(AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.float32), **options)


def written(model, ids, num):
    with tracing(model) as kept:
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, min_new_tokens=num, do_sample=False
        )
    return kept, output[0].tolist()


@pytest.mark.parametrize("options", [{"top_k": 2}, {"routing": "soft"}, {"routing": "top_p"}])
def test_a_traced_answer_equals_a_full_forward_and_the_routers_formula_by_hand(options):
    mixture = llama(**options)
    model, tokenizer = mixture.model, byte_tokenizer()
    ids = torch.tensor([tokenizer.encode("4 + 4 =")])
    kept, output = written(model, ids, 6)
    seen = {}
    hooks = [
        mixer.register_forward_pre_hook(lambda _, inputs, path=path: seen.__setitem__(path, inputs[0][0]))
        for path, mixer in mixture.mixers.items()
    ]
    with tracing(model) as whole, torch.no_grad():
        model(input_ids=torch.tensor([output[:-1]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    trace = trace_of(model, tokenizer, kept, ids[0].tolist(), output, "tiny")
    by_hand, entropies = [], []
    for index, (path, router) in enumerate(mixture.routers.items()):
        torch.testing.assert_close(kept.weights_TE(index), whole.weights_TE(index), rtol=1e-4, atol=1e-5)
        p_TE = (seen[path].double() @ router.weight.double().T).softmax(1)
        entropies.append(-(p_TE * p_TE.log()).sum(1))
        weights_TE = p_TE
        if options.get("top_k"):
            least_T1 = p_TE.topk(2, dim=1).values[:, 1:]
            weights_TE = torch.where(p_TE >= least_T1, p_TE, 0.0)
            weights_TE = weights_TE / weights_TE.sum(1, keepdim=True)
        if options.get("routing") != "top_p":
            torch.testing.assert_close(kept.weights_TE(index).double(), weights_TE, rtol=1e-4, atol=1e-5)
            by_hand.append(weights_TE)
    read = [token for token in trace.tokens if token.weights is not None]
    assert [token.id for token in trace.tokens] == output and len(read) == len(output) - 1
    assert [token.part for token in trace.tokens] == ["prompt"] * 7 + ["answer"] * 6
    if by_hand:
        mean_TE = torch.stack(by_hand).mean(0)
        got_TE = torch.tensor([token.weights for token in read], dtype=torch.float64)
        torch.testing.assert_close(got_TE, mean_TE, rtol=1e-4, atol=1e-5)
    got_T = torch.tensor([token.entropy for token in read], dtype=torch.float64)
    torch.testing.assert_close(got_T, torch.stack(entropies).mean(0), rtol=1e-4, atol=1e-5)


def test_a_router_that_serves_three_projections_counts_three_times():
    mixture = llama(router="per_block")
    ids = torch.tensor([[5, 6, 7, 8]])
    kept, output = written(mixture.model, ids, 3)
    trace = trace_of(mixture.model, byte_tokenizer(), kept, [5, 6, 7, 8], output, "tiny")
    uses = [3.0 if path.endswith("q_proj") else 1.0 for path in mixture.routers]
    assert sorted(uses) == [1.0, 1.0, 3.0, 3.0]
    weights = [use * kept.weights_TE(index) for index, use in enumerate(uses)]
    wanted_E = (torch.stack(weights).sum(0) / sum(uses))[2]
    torch.testing.assert_close(torch.tensor(trace.tokens[2].weights), wanted_E)


def test_numbers_as_json_say_who_spoke_at_each_router_and_that_the_last_token_was_not_read():
    mixture = llama(top_k=2)
    kept, output = written(mixture.model, torch.tensor([[5, 6, 7]]), 2)
    found = trace_json(trace_of(mixture.model, byte_tokenizer(), kept, [5, 6, 7], output, "tiny"))
    assert found["experts"] == list(NAMES) and found["routers"] == list(mixture.routers)
    *read, last = found["tokens"]
    assert last["weights"] is last["entropy"] is last["routers"] is None
    for place, token in enumerate(read):
        assert abs(sum(token["weights"].values()) - 1) < 1e-5
        for index, path in enumerate(mixture.routers):
            heard = token["routers"][path]
            assert len(heard) == 2 and heard[0][1] >= heard[1][1]
            weights_E = kept.weights_TE(index)[place]
            assert heard[0] == [NAMES[int(weights_E.argmax())], float(weights_E.max())]


def test_an_encoder_shows_the_prompt_and_the_decoder_the_answer():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=260,
        d_model=32,
        d_ff=40,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        initializer_factor=5.0,
        decoder_start_token_id=0,
    )
    mixture = mixed(AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32))
    ids = torch.tensor([[9, 10, 11, 12, 1]])
    kept, output = written(mixture.model, ids, 4)
    trace = trace_of(mixture.model, byte_tokenizer(), kept, ids[0].tolist(), output, "tiny")
    assert [token.id for token in trace.tokens] == [9, 10, 11, 12, 1, *output]
    assert [token.weights is None for token in trace.tokens] == [False] * 9 + [True]
    asked = {path for token in trace.tokens[:5] for path in token.routers}
    assert asked == {
        path
        for path in mixture.routers
        if path.startswith("encoder") or path.endswith(("EncDecAttention.k", "n.v"))
    } - {path for path in mixture.routers if "decoder" in path and ".SelfAttention." in path}


def test_pieces_of_text_join_to_the_text_and_keep_letters_whole():
    tokenizer = byte_tokenizer()
    text = "Größe 7 — 東\n<pad>"
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)
    assert [piece for piece in found if piece][:4] == ["G", "r", "ö", "ß"]
    assert pieces(tokenizer, ids[:3])[-1] == "\N{REPLACEMENT CHARACTER}"  # the text ends inside a letter
