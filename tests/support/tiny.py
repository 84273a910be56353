"""Tiny real models with a byte tokenizer, small domains, and a recipe over them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    FalconMambaConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _t5(**kind: Any) -> T5Config:
    """Without dropout of its own, which would differ from layout to layout."""
    return T5Config(
        vocab_size=260,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
        **kind,
    )


_STATE_SPACE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    **SPECIAL,
}

# initializer_range: inputs of every projection are of size one, so that router_std 0.2 makes logits of std 1
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        **SPECIAL,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=260,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SPECIAL,
    ),
    # the first T5, its head tied to the embedding; T5 1.1 and Flan-T5, gated and with a head of their own
    "t5": lambda: _t5(),
    "flan": lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mamba": lambda: MambaConfig(**_STATE_SPACE, time_step_rank=4),
    "falcon_mamba": lambda: FalconMambaConfig(**_STATE_SPACE, time_step_rank=4),
    "mamba2": lambda: Mamba2Config(**_STATE_SPACE, num_heads=8, head_dim=8, n_groups=2, chunk_size=16),
}
STATE_SPACE = {
    "mamba": ["in", "x", "dt", "out"],
    "falcon_mamba": ["in", "x", "dt", "out"],
    "mamba2": ["in", "out"],
}
"""The projections of each kind of state-space model, which recipes name as targets."""
WORDS = "the a red blue small tall cat dog tree house runs sleeps sings and but under over quickly".split()
SIZES = {"sums": 40, "words": 24, "rare": 5}
"""Training examples of the domains; the last one is so small that steps go by without it."""


def write_base(folder: Path, kind: str = "llama") -> Path:
    """A model of random weights with its tokenizer, as transformers saves them."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto_class.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer(ends=config.is_encoder_decoder).save_pretrained(folder)
    return folder


def byte_tokenizer(*, ends: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; ``ends``: a text is closed by the end token, as T5's tokenizer does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if ends:
        backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


UNEVEN_SIZES = {"sums": 400, "words": 60, "rare": 30, "sums1": 70, "words1": 40, "rare1": 12}
"""Of six domains of which the first is larger than a rank's share, and so has several owners."""


def write_domains(folder: Path, sizes: dict[str, int] = SIZES) -> dict[str, Path]:
    """Domains of unequal sizes, with prompts and completions of unequal lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(5)
    paths = {}
    for name, size in sizes.items():
        records = [_record(name.rstrip("1"), draw) for _ in range(size)]
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    return paths


def _record(domain: str, draw: random.Random) -> dict[str, str]:
    if domain == "sums":
        a, b = draw.randrange(10 ** draw.randint(1, 5)), draw.randrange(1000)
        return {"prompt": f"{a}+{b}=", "completion": str(a + b)}
    words = draw.choices(WORDS, k=draw.randint(2, 6))
    if domain == "words":
        return {"prompt": f"{words[0]}:", "completion": " " + " ".join(words)}
    return {"prompt": f"reverse {words[0]} ", "completion": words[0][::-1]}


def _targets(kind: str) -> dict[str, Any]:
    return {"targets": STATE_SPACE[kind]} if kind in STATE_SPACE else {}


def write_recipe(folder: Path, kind: str = "llama", copies: int = 1, sizes: dict[str, int] = SIZES) -> Path:
    """``folder/recipe.yaml``: both stages, six steps each, clipping at work, wide routers.

    ``sizes``: examples of each domain. With ``copies`` above 1 each domain stands there so often, with an
    expert each: ``sums0``, ``sums1``, ….
    Runs go to ``folder/runs``. Adam's eps keeps gradients that are zero but for rounding from moving weights.
    """
    stage = {
        "learning_rate": 5e-3,
        "max_steps": 6,
        "warmup_ratio": 0.3,
        "global_batch_size": 8,
        "clip": 0.5,
        "eps": 1e-6,
    }
    recipe = {
        "run": {"dir": str(folder / "runs"), "seed": 3, "tensorboard": False},
        "base": {"model": str(write_base(folder / kind, kind)), "dtype": "float32"},
        "data": {
            "max_length": 64,
            "domains": [
                {"name": name, "train": str(path)}
                for file, path in write_domains(folder / "data", sizes).items()
                for name in ([f"{file}{i}" for i in range(copies)] if copies > 1 else [file])
            ],
        },
        "mixer": {"rank": 4, "alpha": 8, "dropout": 0.0, "router_std": 0.2, **_targets(kind)},
        "stage1": {**stage},
        "stage2": {
            **stage,
            "top_k": 2,
            "data": {"max_share": 0.4},
            "rsl": {"alpha": 0.5, "entropy_weight": 0.3},
            "preserve": {"beta": 0.05},
        },
        "checkpoint": {"every": 3},
        "evaluation": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
