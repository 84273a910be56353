"""Rows of one batch that go different ways, each beside itself alone in a batch of one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from dsmixer import BY_ROUTERS, MixerConfig, UserError, attach_mixers, route_to
from dsmixer.routing.modes import Routing, topk, topk_of_logits

NAMES = ("law", "chess", "sums", "code")
REQUESTS = ["law", BY_ROUTERS, None, "chess"]
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23], [31, 32, 33, 34]]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **IDS,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60,
        d_model=32,
        d_ff=40,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        initializer_factor=8.0,
        decoder_start_token_id=0,
        **IDS,
    )
    return AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def mixed(model, **options):
    """With experts and routers far from where they start."""
    chosen = {"targets": ("q", "k", "v", "o"), "rank": 4, "alpha": 8, "router_std": 0.5, **options}
    mixture = attach_mixers(model, MixerConfig(experts=NAMES, **chosen))
    generator = torch.Generator().manual_seed(3)
    for mixer in mixture.mixers.values():
        mixer.bank.lora_B.normal_(0.0, 0.3, generator=generator)
        mixer.bank.lora_B[:, 4:] = 0.0
    return model


def padded(prompts, side="left"):
    width = max(map(len, prompts))
    fill = [[0] * (width - len(prompt)) for prompt in prompts]
    rows = [f + p if side == "left" else p + f for f, p in zip(fill, prompts, strict=True)]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def alone(model, prompt, request, **options):
    with nullcontext() if request is BY_ROUTERS else route_to(model, request):
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **options
        )
    return out


def written(rows, skipped):
    """The answers, without what pads them."""
    return [[token for token in row[skipped:].tolist() if token != 0] for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": "per_block"},
        {"routing": "soft"},
        {"compute": "grouped", "top_k": 1, "renormalize": False},
        {"routing": "top_p", "top_p": 0.6},
        {"compute": "loop"},
    ],
)
def test_each_row_of_a_left_padded_batch_writes_what_it_writes_alone(options):
    model = mixed(llama(), **options)
    greedy = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with route_to(model, REQUESTS):
        together = model.generate(**padded(PROMPTS), **greedy)
    distinct = set()
    for row, (prompt, request) in enumerate(zip(PROMPTS, REQUESTS, strict=True)):
        single = alone(model, prompt, request, **greedy)
        answer = single.sequences[0, len(prompt) :].tolist()
        assert together.sequences[row, 5 : 5 + len(answer)].tolist() == answer
        distinct.add(tuple(answer))
        for step, logits in enumerate(single.logits):
            torch.testing.assert_close(together.logits[step][row], logits[0], rtol=1e-4, atol=1e-4)
    assert len(distinct) == len(REQUESTS)


def test_a_row_without_experts_is_the_untouched_model():
    batch, model = padded(PROMPTS), mixed(llama())
    wanted = llama()(**batch).logits
    with route_to(model, [None, "law", None, BY_ROUTERS]), torch.no_grad():
        got = model(**batch).logits
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[2], wanted[2])
    assert not torch.allclose(got[1], wanted[1], atol=1e-2)
    with route_to(model, [None] * 4), torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted)


@pytest.mark.parametrize(
    "search",
    [
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_beams": 1, "num_return_sequences": 3, "do_sample": True, "top_k": 1},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_beams_and_returned_sequences_stay_with_their_request(kind, search):
    model = mixed(llama() if kind == "llama" else t5())
    options = {"max_new_tokens": 6, **search}
    with route_to(model, REQUESTS):
        batch = padded(PROMPTS, "left" if kind == "llama" else "right")
        together = model.generate(**batch, **options)
    per_row, own = search["num_return_sequences"], kind == "llama"
    assert len(together) == per_row * len(REQUESTS)
    for row, (prompt, request) in enumerate(zip(PROMPTS, REQUESTS, strict=True)):
        single = alone(model, prompt, request, **options)
        got = written(together[row * per_row : (row + 1) * per_row], 5 if own else 1)
        assert got == written(single, len(prompt) if own else 1)


def test_one_request_for_all_is_what_it_was():
    batch, model = padded(PROMPTS), mixed(llama())
    with torch.no_grad():
        plain = model(**batch).logits
        for request in ("law", None, BY_ROUTERS):
            with route_to(model, request):
                one = model(**batch).logits
            with route_to(model, [request] * 4):
                torch.testing.assert_close(model(**batch).logits, one, rtol=1e-5, atol=1e-5)
            assert torch.equal(one, plain) == (request is BY_ROUTERS)
        with route_to(model, "law"), route_to(model, [BY_ROUTERS, "law"]):
            torch.testing.assert_close(model(**batch).logits[:2], plain[:2], rtol=1e-5, atol=1e-5)


def test_gradients_of_forced_rows_reach_their_expert_alone():
    model = mixed(llama())
    bank = model.dsmixer.mixture.mixers["model.layers.0.self_attn.q_proj"].bank
    with route_to(model, ["sums", None, "sums", None]):
        model(**padded(PROMPTS)).logits.square().sum().backward()
    assert [bool(bank.lora_A.grad[e].any()) for e in range(4)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        (["law", "physics", None, None], "row 1: no expert is called 'physics'"),
        ([], "a batch of no requests"),
        (["law", 3, None, None], "no expert is called 3"),
        (["law", None, BY_ROUTERS], "3 requests for a batch of 4 rows"),
        (["law"] * 8, "8 requests for a batch of 4 rows"),
        (["law"] * 5, "5 requests for a batch of 4 rows"),  # of five tokens each
    ],
)
def test_requests_that_do_not_fit_are_refused(requests, reason):
    model = mixed(llama())
    with pytest.raises(UserError, match=reason), route_to(model, requests):
        model(**padded(PROMPTS))
    model(**padded(PROMPTS))  # and everything is as it was


def test_top_k_of_logits_is_the_renormalised_top_k_of_the_softmax():
    logits_TE = torch.randn(50, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = Routing(top_k=4)
    wanted, got = topk(logits_TE.softmax(1), routing), topk_of_logits(logits_TE, routing)
    assert torch.equal(got.indices_TK, wanted.indices_TK)
    torch.testing.assert_close(got.weights_TK, wanted.weights_TK, rtol=1e-12, atol=1e-15)
