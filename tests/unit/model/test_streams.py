"""Whose tokens a projection sees, against what flows through an untouched model; and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import CONFIGS, write_base
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    MT5Config,
    T5Config,
    UMT5Config,
)

from dsmixer import MixerConfig, attach_mixers
from dsmixer.config.errors import UserError
from dsmixer.config.schema import BaseConfig
from dsmixer.model.inject import Mixture
from dsmixer.model.load import bare_base, load_base
from dsmixer.model.streams import stream_of
from dsmixer.routing.context import BatchRouting
from dsmixer.routing.statistics import RoutingStatistics

READ, WRITTEN = 7, 4
"""Tokens of the encoder and of the decoder, in each of two rows."""


def seen_lengths(model: Any) -> dict[str, int]:
    """Tokens a row that went into each linear layer of an untouched model."""
    seen: dict[str, int] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = inputs[0].shape[1]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(keep(name))
    ids = torch.arange(3, 3 + 2 * READ).view(2, READ)
    model(input_ids=ids, decoder_input_ids=ids[:, :WRITTEN])
    return seen


@pytest.mark.parametrize("kind", [T5Config, MT5Config, UMT5Config])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_a_projection_is_of_the_stream_whose_tokens_it_sees(kind: Any, feed_forward: str) -> None:
    config = kind(
        vocab_size=64,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    seen = seen_lengths(model)
    assert len(seen) > 20 and set(seen.values()) == {READ, WRITTEN}
    for name, length in seen.items():
        assert stream_of(model, name) == ("encoder" if length == READ else "decoder"), name


def mixture_of(router: str = "per_projection") -> Mixture:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS["flan"]())
    config = MixerConfig(targets="qkvo", experts=["a", "b"], rank=4, router=router, router_std=0.5)
    return attach_mixers(model, config)


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.parametrize("again", [False, True])
def test_each_router_counts_the_real_tokens_of_its_own_stream_once(router: str, again: bool) -> None:
    """Also where layers are run again in the backward pass, and where key and value share a router."""
    mixture = mixture_of(router)
    if again:
        mixture.model.gradient_checkpointing_enable({"use_reentrant": False})
    mixture.model.train()
    for _, parameter in mixture.router_parameters():
        parameter.requires_grad_(True)
    ids = torch.arange(3, 3 + 2 * READ).view(2, READ)
    read, written = torch.ones(2, READ), torch.ones(2, WRITTEN)
    read[1, 5:], written[1, 3:] = 0, 0
    domains = [mask.flatten().long() - 1 for mask in (written, read)]
    batch = BatchRouting(
        mask_T=written.flatten(),
        domains_T=domains[0],
        encoder=BatchRouting(mask_T=read.flatten(), domains_T=domains[1]),
    )
    statistics = RoutingStatistics(len(mixture.routers), 2, num_domains=1)
    with mixture.context.recording(batch, statistics, lambda output, index: output.entropy_T().sum()):
        out = mixture.model(
            input_ids=ids, attention_mask=read.long(), decoder_input_ids=ids[:, :WRITTEN], use_cache=False
        )
    loss = mixture.context.take_loss()
    assert loss is not None
    (out.logits.sum() + loss).backward()
    expected = [float((read if stream == "encoder" else written).sum()) for stream in mixture.streams]
    assert set(expected) == {12.0, 7.0}
    assert statistics.tokens_M.tolist() == expected
    assert statistics.domain_MGE.sum((1, 2)).tolist() == expected
    shares = 4 if router == "per_projection" else 2
    assert len(mixture.routers) == shares * 3 + (shares + (4 if router == "per_projection" else 3)) * 2
    assert all(p.grad is not None and bool(p.grad.any()) for _, p in mixture.router_parameters())


def test_a_decoder_alone_has_one_stream() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    mixture = attach_mixers(model, MixerConfig(targets="qkvo", experts=["a", "b"], rank=4))
    assert set(mixture.streams) == {"decoder"}


def test_an_encoder_decoder_base_is_loaded_with_its_head(tmp_path: Path) -> None:
    base = BaseConfig(model=str(write_base(tmp_path, "t5")), dtype="bfloat16")
    loaded = load_base(base)
    assert type(loaded.model).__name__ == type(bare_base(base)).__name__ == "T5ForConditionalGeneration"
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("what", ["kind", "packing", "start"])
def test_what_can_not_be_trained_is_refused_before_weights_are_loaded(tmp_path: Path, what: str) -> None:
    config: Any = CONFIGS["t5"]()
    if what == "kind":
        config = BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1)
    if what == "start":
        config.decoder_start_token_id = None
    config.save_pretrained(tmp_path)
    words = {"kind": "bart is an encoder-decoder", "packing": "see each other", "start": "decoder starts"}
    with pytest.raises(UserError, match=words[what]):
        bare_base(BaseConfig(model=str(tmp_path)), packing=what == "packing")
