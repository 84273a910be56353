"""Batched answers of an encoder-decoder model, each beside the request alone."""

from __future__ import annotations

import torch
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, T5Config

from dsmixer import BY_ROUTERS, MixerConfig, attach_mixers, route_to
from dsmixer.evaluation.answers import Asked, answers


def test_an_encoder_decoder_answers_a_batch_as_it_answers_each_request():
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
    )
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
    mixture = attach_mixers(
        model, MixerConfig(targets=("q", "v"), experts=("a", "b"), rank=4, router_std=0.5)
    )
    for mixer in mixture.mixers.values():
        torch.nn.init.normal_(mixer.bank.lora_B, std=0.5)

    def configured(limit):
        return GenerationConfig(
            max_new_tokens=limit, do_sample=False, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
        )

    asked = [
        Asked([5, 6, 7, 8, 1], "a", 6),
        Asked([9, 1], None, 3),
        Asked([11, 12, 13, 1], BY_ROUTERS, 8),
        Asked([20, 21, 1], "b", 5),
        Asked([30, 1], BY_ROUTERS, 4),
    ]
    got = list(answers(model, asked, batch_size=3, configured=configured))
    for one, tokens in zip(asked, got, strict=True):
        with route_to(model, one.to):
            output = model.generate(
                torch.tensor([one.prompt_ids]), generation_config=configured(one.max_new_tokens)
            )
        assert tokens == output[0, 1:].tolist()
        assert 0 < len(tokens) <= one.max_new_tokens
    assert len({tuple(tokens[:3]) for tokens in got}) > 2
