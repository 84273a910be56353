"""A small mixture, a byte tokenizer, and domains of written answers and of choices."""

from __future__ import annotations

import pytest
import torch
from support.tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmixer.data.domains import Domain
from dsmixer.data.records import Example
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte."""
    return byte_tokenizer()


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def stirred(mixture):
    """Weights far from zero everywhere, so that every method answers something else."""
    generator = torch.Generator().manual_seed(7)
    for mixer in mixture.mixers.values():
        for e, rank in enumerate(mixer.bank.ranks):
            for weight in (mixer.bank.lora_A, mixer.bank.lora_B):
                weight[e, :rank].normal_(0.0, 0.4, generator=generator)
    for router in mixture.routers.values():
        router.weight.normal_(0.0, 1.0, generator=generator)
    return mixture


@pytest.fixture
def stir():
    """Gives a mixture weights far from zero."""
    return stirred


@pytest.fixture
def make_mixture():
    """A mixture on a tiny Llama from the fields of a ``MixerConfig``."""
    return lambda **options: stirred(attach_mixers(tiny_llama(), MixerConfig(**options)))


@pytest.fixture
def mixture(make_mixture):
    return make_mixture(targets=["q", "v", "o"], experts=["sums", "taste", "spare"], rank=4, alpha=8)


def written(name, pairs):
    return [
        Example(prompt, completion, name, location=f"{name}:{i}")
        for i, (prompt, completion) in enumerate(pairs)
    ]


def chosen(name, triples):
    return [
        Example(prompt, choices[answer], name, choices, answer, f"{name}:{i}")
        for i, (prompt, choices, answer) in enumerate(triples)
    ]


@pytest.fixture
def domains():
    sums = written("sums", [(f"{a}+{b} =", f" {a + b}") for a in range(1, 5) for b in (7, 30, 555)])
    films = [" fine", " a rather dull one", " so"]
    taste = chosen("taste", [(f"film {i}:", tuple(films), [0, 2, 1, 0, 0][i % 5]) for i in range(7)])
    odd = written("odd", [("Wie groß?", " Größe 7"), ("x" * 40, " y")])
    return [
        Domain("sums", "sums", 1.0, sums, sums),
        Domain("untested", "spare", 1.0, sums, []),
        Domain("taste", "taste", 1.0, taste, taste),
        Domain("odd", "nobody", 1.0, odd, odd),
    ]
