"""A mixture on another base: of the same shapes it is the same mixture, and what does not match is listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from dsmixer.adapters.loading import load_mixture
from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.adapters.saved_mixture import check_base, misfits, read_mixture
from dsmixer.config.errors import UserError
from dsmixer.model.inject import attach_mixers, mixture_of
from dsmixer.model.mixer_config import MixerConfig

HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, **HEADS}
MISTRAL_7B = MistralConfig(vocab_size=32768, sliding_window=None, **SIZES)
LLAMA3_8B = LlamaConfig(vocab_size=128256, **SIZES)
LLAMA2_7B = LlamaConfig(vocab_size=32000, **{**SIZES, "num_key_value_heads": 32, "intermediate_size": 11008})
"""Sizes as the models' own config.json has them: the hub is not asked."""


def bare(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def of_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of two experts of rank 1 on q, k, v and o of Mistral-7B, whose own weights are nowhere."""
    mixture = attach_mixers(bare(MISTRAL_7B), MixerConfig(["q", "k", "v", "o"], ["law", "chess"], rank=1))
    parameters = [*mixture.expert_parameters(), *mixture.router_parameters()]
    state = {name: torch.full(parameter.shape, 0.5) for name, parameter in parameters}
    folder = tmp_path_factory.mktemp("transfer") / "mistral"
    return save_mixture(mixture, folder, base="mistralai/Mistral-7B-v0.3", state=state)


def test_mistral_7b_to_llama3_8b_matches_in_every_projection(of_mistral: Path) -> None:
    """Table 5 of the paper; the shapes alone, on the meta device."""
    saved, model = read_mixture(of_mistral), bare(LLAMA3_8B)
    assert list(misfits(saved, model)) == []
    check_base(saved, model, transfer=True)
    with pytest.raises(UserError, match="the base is a llama model, and the mixture was made on a mistral"):
        check_base(saved, model, transfer=False)


def test_what_does_not_match_is_counted_and_the_first_lines_are_shown(of_mistral: Path) -> None:
    """LLaMA2-7B has as many heads for keys and values as for queries: 64 of the 128 projections differ."""
    saved = read_mixture(of_mistral)
    with pytest.raises(UserError) as refused:
        check_base(saved, bare(LLAMA2_7B), transfer=True)
    problem = refused.value.problem
    assert "of 128 projections, does not fit this base; 64 do not match" in problem
    assert "model.layers.0.self_attn.k_proj: 4096 to 1024 in the mixture, 4096 to 4096 in the base" in problem
    assert len(problem.splitlines()) == 8 and problem.endswith("and 58 more")


def test_other_layers_and_other_names_are_listed(of_mistral: Path) -> None:
    saved = read_mixture(of_mistral)
    fewer = LlamaConfig(vocab_size=100, **{**SIZES, "num_hidden_layers": 31})
    more = LlamaConfig(vocab_size=100, **{**SIZES, "num_hidden_layers": 33})
    absent, beyond = list(misfits(saved, bare(fewer))), list(misfits(saved, bare(more)))
    assert absent == [f"model.layers.31.self_attn.{x}_proj: the base has no such module" for x in "koqv"]
    assert beyond == [
        f"model.layers.32.self_attn.{x}_proj: in the base, and the mixture has nothing for it" for x in "qkvo"
    ]
    gpt2 = list(misfits(saved, bare(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100))))
    assert len(gpt2) == 128 + 2 and gpt2[-2].startswith("transformer.h.0.attn.c_attn: in the base")


def test_a_transferred_mixture_has_the_same_experts_and_routers_on_the_other_base(
    make_mixture, load_base, token_ids, tmp_path
) -> None:
    """With a base of another kind whose every weight is the same, it computes the same."""
    mixture = make_mixture("llama")
    save_mixture(mixture, tmp_path / "m", base="org/llama")
    llama = load_base("llama")
    values = llama.config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = MistralConfig(
        **{key: values[key] for key in keys},
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=None,
        rms_norm_eps=values["rms_norm_eps"],
    )
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    other.load_state_dict(llama.state_dict())
    other.save_pretrained(tmp_path / "mistral")
    with pytest.raises(UserError, match="ask for a transfer"):
        load_mixture(tmp_path / "m", base=tmp_path / "mistral")
    model, _ = load_mixture(tmp_path / "m", base=tmp_path / "mistral", transfer=True)
    assert model.config.model_type == "mistral" and mixture_of(model).config == mixture.config
    with torch.no_grad():
        wanted = mixture.model(token_ids).logits
        torch.testing.assert_close(model(token_ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_transfer_takes_the_tokenizer_of_the_base_it_goes_to(
    make_mixture, base_folder, tokenizer, tmp_path
) -> None:
    """The mixture's own numbers other words."""
    save_mixture(make_mixture("llama"), tmp_path / "m", tokenizer=tokenizer, base=str(base_folder("llama")))
    assert load_mixture(tmp_path / "m")[1] is not None
    assert load_mixture(tmp_path / "m", base=base_folder("llama"), transfer=True)[1] is None
