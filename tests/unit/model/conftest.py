"""Tiny real transformers models with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

_HEADS: dict[str, object] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_WIDE: dict[str, object] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
}
_IDS: dict[str, object] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MODERN = {**_WIDE, **_HEADS, **_IDS}
_OLD = {**_WIDE, "num_attention_heads": 4, **_IDS}
_GPT: dict[str, object] = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2}

ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": _MODERN,
    "mistral": {**_MODERN, "sliding_window": 16},
    "qwen2": _MODERN,
    "qwen3": {**_MODERN, "head_dim": 8},
    "gemma": {**_MODERN, "head_dim": 8},
    "phi3": _MODERN,
    "gpt_neox": _OLD,
    "gpt2": _GPT,
    "mpt": {"vocab_size": 60, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "codegen": {**_GPT, "rotary_dim": 4, "n_ctx": 64},
}

TinyModel = Callable[..., PreTrainedModel]


@pytest.fixture
def tiny() -> TinyModel:
    """``tiny("llama", hidden_size=64)``: a two-layer model of that type, in evaluation mode."""

    def build(model_type: str, **changes: object) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type], **changes})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        return model

    return build
