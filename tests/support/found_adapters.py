"""Models of random weights in the shapes that found adapters need, and the formula of PEFT's first form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

TEXT = torch.randint(3, 95, (2, 9), generator=torch.Generator().manual_seed(3))
VOCABULARY = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 16,
}
VISION = {**TOWER, "image_size": 8, "patch_size": 4}
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))

# the widths and depths that the found adapters have weights for, with a small vocabulary
LARGE: dict[str, Any] = {
    "bloom-560m": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(**VOCABULARY, hidden_size=1024, n_layer=24, n_head=16)
    ),
    "gpt2-fan-in-fan-out": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**VOCABULARY)),
    "flan-t5-small": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=97,
            d_model=512,
            d_kv=64,
            d_ff=1024,
            num_layers=8,
            num_decoder_layers=8,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    ),
}

# models of the found configurations' kinds, with inputs
SMALL: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(**VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
        {"input_ids": TEXT},
    ),
    "clip": (
        lambda: tf.CLIPModel(
            tf.CLIPConfig(text_config={**VOCABULARY, **TOWER}, vision_config=VISION, projection_dim=16)
        ),
        {"input_ids": TEXT, "pixel_values": PIXELS},
    ),
    "distilbert": (
        lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(vocab_size=97, dim=32, hidden_dim=48, n_layers=2, n_heads=4, num_labels=3)
        ),
        {"input_ids": TEXT},
    ),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**VOCABULARY, n_embd=32, n_layer=2, n_head=4)),
        {"input_ids": TEXT},
    ),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), {"input_ids": TEXT}),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA)), {"input_ids": TEXT}),
    "paligemma": (
        lambda: tf.PaliGemmaForConditionalGeneration(
            tf.PaliGemmaConfig(
                text_config={**LLAMA, "model_type": "gemma", "head_dim": 8},
                vision_config={**VISION, "model_type": "siglip_vision_model"},
                projection_dim=32,
                image_token_index=96,
            )
        ),
        {"input_ids": TEXT},
    ),
    "qwen2": (
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**LLAMA, "num_hidden_layers": 36})),
        {"input_ids": TEXT},
    ),
}


def random_model(name: str) -> nn.Module:
    """A model of random weights that a found adapter fits."""
    torch.manual_seed(0)
    return LARGE[name]().eval()


def tiny(kind: str) -> nn.Module:
    """A tiny model of random weights, the same in each call."""
    torch.manual_seed(0)
    return SMALL[kind][0]().eval()


def outputs_with(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The logits, or what a model without a head says of its inputs."""
    outputs = model(**inputs)
    return outputs.logits if hasattr(outputs, "logits") else outputs.logits_per_text


@torch.no_grad()
def train_by_chance(adapted: nn.Module) -> nn.Module:
    """Give every factor of an adapter weights that matter."""
    draw = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.normal_(0.0, 0.1, generator=draw)
    return adapted.eval()


@contextmanager
def enabled_thirds(
    model: nn.Module, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], groups: int = 2
) -> Iterator[None]:
    """The first form of PEFT's LoRA as its forward pass was written, in float64, beside a model's own.

    ``lora_B`` is a convolution of width one in groups (PEFT 0.1 and 0.2 had always two), after which zeros
    are put in for the parts that were not enabled.
    """
    enabled = torch.tensor(config["enable_lora"])
    scale = config["lora_alpha"] / config["r"]
    hooks = []
    for key, a in weights.items():
        if "lora_A" not in key:
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        factors = a.double(), weights[key.replace("lora_A", "lora_B")].double()

        def hook(module: Any, args: Any, y: Any, factors: Any = factors) -> torch.Tensor:
            after_a = F.linear(args[0].double(), factors[0])
            after_b = F.conv1d(after_a.transpose(-2, -1), factors[1], groups=groups).transpose(-2, -1)
            padded = y.new_zeros(y.shape, dtype=torch.float64)
            there = enabled.repeat_interleave(y.shape[-1] // len(enabled))
            padded[..., there] = after_b
            return (y.double() + padded * scale).to(y.dtype)

        hooks.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
