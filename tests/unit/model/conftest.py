"""Tiny real transformers models with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
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
_T5: dict[str, object] = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2}
_T5 |= {"num_heads": 4, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_MAMBA: dict[str, object] = {**_IDS, "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}
_MAMBA |= {"state_size": 8, "expand": 2, "time_step_rank": 4, "tie_word_embeddings": False}

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
    "opt": {**_OLD, "ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
}

TinyModel = Callable[..., PreTrainedModel]


@pytest.fixture
def tiny() -> TinyModel:
    """``tiny("llama", hidden_size=64)``: a two-layer model of that type, in evaluation mode."""

    def build(model_type: str, **changes: object) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type], **changes})
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        options = {} if "mamba" in model_type else {"attn_implementation": "eager"}
        model: PreTrainedModel = kind.from_config(config, **options).eval()
        return model

    return build
