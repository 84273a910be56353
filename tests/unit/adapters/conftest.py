"""Small real models of several architectures, with mixtures that say something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixer_config import MixerConfig

VOCABULARY = 260

CONFIGS: dict[str, Any] = {
    # grouped-query attention: k and v are narrower than q
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "phi3": lambda: Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
    ),
}


def make_base(kind: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a saved base model; asked for twice, it is the same one."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"base-{kind}")
            make_base(kind).save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def load_base(base_folder: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """A fresh copy of a saved base model, float32."""

    def load(kind: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(base_folder(kind), dtype=torch.float32).eval()

    return load


@pytest.fixture(scope="session")
def make_mixture(load_base: Callable[[str], PreTrainedModel]) -> Callable[..., Mixture]:
    """A mixture of two experts of different rank and alpha, whose weights are all far from zero."""

    def make(kind: str, **options: Any) -> Mixture:
        settings = {
            "targets": ["q", "k", "v", "o"],
            "experts": ["law", "chess"],
            "ranks": {"law": 4, "chess": 6},
            "alphas": {"law": 8, "chess": 3.5},
            **options,
        }
        mixture = attach_mixers(load_base(kind), MixerConfig(**settings))
        stir(mixture)
        mixture.model.eval()
        return mixture

    return make


@torch.no_grad()
def stir(mixture: Mixture) -> None:
    """Give experts and routers weights that matter; rows that only pad a rank stay zero."""
    generator = torch.Generator().manual_seed(7)
    for mixer in mixture.mixers.values():
        for e, rank in enumerate(mixer.bank.ranks):
            for weight in (mixer.bank.lora_A, mixer.bank.lora_B):
                weight[e, :rank].normal_(0.0, 0.3, generator=generator)
    for router in mixture.routers.values():
        router.weight.normal_(0.0, 1.0, generator=generator)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    return byte_tokenizer()


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, 11), generator=torch.Generator().manual_seed(3))
