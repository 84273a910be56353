"""Which known architectures keep the examples of a packed row apart: exactly those in ``PACKABLE``."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dsmixer.config.errors import UserError
from dsmixer.config.schema import BaseConfig
from dsmixer.model.load import load_base
from dsmixer.model.targets import ARCHITECTURES, PACKABLE

LENGTHS = (7, 9)
TOLERANCE = 1e-5
VOCABULARY = 60

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON: dict[str, object] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT: dict[str, object] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MOE: dict[str, object] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Windows shorter than the first example, so that the sliding mask is told apart from the full one.
_EVERY_SECOND = ["sliding_attention", "full_attention"]
_WINDOW: dict[str, object] = {"sliding_window": 4}
_QWEN_WINDOW: dict[str, object] = {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}
_NEO: dict[str, object] = {"num_layers": 2, "num_heads": 4, "window_size": 4}
_NEO |= {"attention_types": [[["global", "local"], 1]]}

# transformers 5.23 has no sdpa for these
EAGER_ONLY = ("bloom", "gemma2", "gpt_neo", "gptj")

# state-space models carry their state over, and encoder-decoders have rows of two parts: refused by kind
NO_DECODER_ATTENTION = ("mamba", "falcon_mamba", "mamba2", "t5", "mt5")

OWN: dict[str, dict[str, object]] = {
    "mistral": _WINDOW,
    "mixtral": {**_WINDOW, "num_local_experts": 4},
    "qwen2": _QWEN_WINDOW,
    "qwen2_moe": {**_QWEN_WINDOW, **_MOE, "shared_expert_intermediate_size": 24},
    "qwen3": {**_QWEN_WINDOW, "head_dim": 8},
    "qwen3_moe": {**_QWEN_WINDOW, **_MOE, "head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {**_WINDOW, "head_dim": 8, "layer_types": _EVERY_SECOND},
    "gemma3_text": {**_WINDOW, "head_dim": 8, "layer_types": _EVERY_SECOND},
    "smollm3": {**_WINDOW, "use_sliding_window": True, "layer_types": _EVERY_SECOND},
    "starcoder2": _WINDOW,
    "phi3": _WINDOW,
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neo": _NEO,
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"ffn_hidden_size": 40},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
}


def tiny(model_type: str, attention: str) -> PreTrainedModel:
    own = OWN.get(model_type, {})
    common = {} if "n_embd" in own else _COMMON
    config = AutoConfig.for_model(model_type, **{**_IDS, **common, **own})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "router" not in name:
            # The usual start is so small that attention is nearly uniform and a leak would hardly show.
            torch.nn.init.normal_(parameter, std=0.3)
    return model.float().eval()


@torch.no_grad()
def change_of_second(model: PreTrainedModel) -> float:
    """How far the second example's logits move, at most, when the first example in its row changes."""
    draw = torch.Generator().manual_seed(0)
    first, other, second = (
        torch.randint(3, VOCABULARY, (1, n), generator=draw) for n in (LENGTHS[0], *LENGTHS)
    )
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    logits = [
        model(input_ids=torch.cat([a, second], 1), position_ids=positions, use_cache=False).logits
        for a in (first, other)
    ]
    assert (logits[0][:, : LENGTHS[0]] - logits[1][:, : LENGTHS[0]]).abs().max() > 0.01
    return float((logits[0] - logits[1])[:, LENGTHS[0] :].abs().max())


CASES = [
    (model_type, attention)
    for model_type in sorted({*ARCHITECTURES, *PACKABLE} - {*NO_DECODER_ATTENTION})
    for attention in ("eager", "sdpa")
    if attention == "eager" or model_type not in EAGER_ONLY
]


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_packable_are_exactly_the_types_whose_examples_do_not_see_each_other(
    model_type: str, attention: str
) -> None:
    assert not PACKABLE & {*NO_DECODER_ATTENTION}
    model = tiny(model_type, attention)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    apart = takes_positions and change_of_second(model) <= TOLERANCE
    assert apart == (model_type in PACKABLE)


@pytest.mark.parametrize("kind", ["falcon", "opt", "codegen"])
def test_packing_is_refused_for_any_other_architecture_before_weights_are_read(
    tmp_path: Path, kind: str
) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"the architecture {kind} is not known to keep") as caught:
        load_base(BaseConfig(model=str(tmp_path)), packing=True)
    assert "write data.packing: false" in str(caught.value)
