"""The paper's parameter figures, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import PreTrainedModel

from dsmixer.model.count import count_weights
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig


def llama3_8b() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_llama3_8b_with_six_experts_of_rank_64_counts_as_the_design_says() -> None:
    experts = ["medical", "cola", "sst2", "gsm8k", "arc", "humaneval"]
    mixture = attach_mixers(llama3_8b(), MixerConfig("qkvo", experts, rank=64, alpha=128))
    counts = count_weights(mixture)
    assert all(p.is_meta for p in mixture.model.parameters())
    assert counts.base == 8_030_261_248
    # r (D + O) a projection: q and o are 4096 to 4096, k and v 4096 to 1024
    assert counts.experts == 6 * 32 * 64 * (2 * (4096 + 4096) + 2 * (4096 + 1024)) == 327_155_712
    assert counts.routers == 32 * 4 * 6 * 4096 == 3_145_728
    assert f"{100 * counts.added_share:.3f}" == "3.951"
    assert f"{100 * counts.router_share:.4f}" == "0.0392"


def test_one_router_a_block_counts_half() -> None:
    mixture = attach_mixers(llama3_8b(), MixerConfig("qkvo", "abcdef", rank=64, router="per_block"))
    assert count_weights(mixture).routers == 3_145_728 // 2


def test_padding_of_small_ranks_and_tied_embeddings_are_not_counted_twice(
    tiny: Callable[..., PreTrainedModel],
) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    before = sum(p.numel() for p in model.parameters())
    mixture = attach_mixers(model, MixerConfig("qk", "ab", rank=6, ranks={"b": 3}))
    counts = count_weights(mixture)
    assert counts.base == before
    assert counts.experts == 2 * (6 + 3) * ((32 + 32) + (32 + 16))
    assert counts.added == counts.experts + counts.routers
