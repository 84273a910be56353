"""Which projections are found on real transformers classes, and what is said where they are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from dsmixer.config.errors import UserError
from dsmixer.model.inject import attach_mixers, mixture_of, route_to
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.targets import find_targets

TinyModel = Callable[..., PreTrainedModel]

SEPARATE = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
}
# model type -> projections of a layer with (D, O), by reading the classes of transformers 5.23
EXPECTED: dict[str, tuple[str, dict[str, tuple[int, int]]]] = {
    "llama": ("model.layers.{}.", SEPARATE),
    "mistral": ("model.layers.{}.", SEPARATE),
    "qwen2": ("model.layers.{}.", SEPARATE),
    "qwen3": ("model.layers.{}.", SEPARATE),
    "gemma": ("model.layers.{}.", SEPARATE),
    "phi3": ("model.layers.{}.", {"self_attn.qkv_proj": (32, 64), "self_attn.o_proj": (32, 32)}),
    "gpt_neox": (
        "gpt_neox.layers.{}.",
        {"attention.query_key_value": (32, 96), "attention.dense": (32, 32)},
    ),
    "gpt2": ("transformer.h.{}.", {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32)}),
    "mpt": ("transformer.blocks.{}.", {"attn.Wqkv": (32, 96), "attn.out_proj": (32, 32)}),
    "codegen": ("transformer.h.{}.", {"attn.qkv_proj": (32, 96), "attn.out_proj": (32, 32)}),
}
FUSED = [name for name, (_, layer) in EXPECTED.items() if len(layer) == 2]


def expected_paths(model_type: str) -> dict[str, tuple[int, int]]:
    prefix, layer = EXPECTED[model_type]
    return {prefix.format(i) + name: widths for i in range(2) for name, widths in layer.items()}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_q_k_v_o_are_found_with_their_true_widths(tiny: TinyModel, model_type: str) -> None:
    model = tiny(model_type)
    found = {t.path: (t.in_features, t.out_features) for t in find_targets(model, ["q", "k", "v", "o"])}
    assert found == expected_paths(model_type)
    for path, (width_in, width_out) in found.items():
        weight = model.get_parameter(f"{path}.weight")
        assert set(weight.shape) == {width_in, width_out}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_an_expert_on_every_target_changes_the_output_and_gets_a_gradient(
    tiny: TinyModel, model_type: str
) -> None:
    """Found is not enough: each mixer must be in the computation, forward and backward."""
    model = tiny(model_type)
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    base = model(input_ids=ids).logits.detach()
    mixture = attach_mixers(model, MixerConfig(["q", "k", "v", "o"], ["a", "b"], rank=4, alpha=8))
    torch.testing.assert_close(model(input_ids=ids).logits, base)
    for _, parameter in mixture.expert_parameters():
        nn.init.normal_(parameter, std=0.2)
    with route_to(model, "a"):
        logits = model(input_ids=ids).logits
    assert not torch.allclose(logits, base, atol=1e-4)
    logits.square().sum().backward()
    for name, parameter in mixture.expert_parameters():
        assert parameter.grad is not None and parameter.grad[0].any(), name
        assert not parameter.grad[1].any(), name
    with route_to(model, None):
        assert torch.equal(model(input_ids=ids).logits, base)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    ours = {name for name, _ in (*mixture.expert_parameters(), *mixture.router_parameters())}
    assert trainable == ours


@pytest.mark.parametrize("model_type", FUSED)
@pytest.mark.parametrize("subset", [["q"], ["q", "v"], ["k", "v", "o"]])
def test_a_part_of_a_fused_projection_is_refused(tiny: TinyModel, model_type: str, subset: list[str]) -> None:
    with pytest.raises(UserError, match="fused projection for q, k, v") as caught:
        find_targets(tiny(model_type), subset)
    assert "name all of q, k, v" in str(caught.value)


def test_a_fused_projection_by_its_own_name_is_taken(tiny: TinyModel) -> None:
    found = find_targets(tiny("phi3"), ["qkv_proj"])
    assert [t.path for t in found] == [f"model.layers.{i}.self_attn.qkv_proj" for i in range(2)]


@pytest.mark.parametrize("missing", [["qproj"], ["q", "Q_PROJ"], ["proj"], ["attn.q_proj"], [""]])
def test_a_target_that_matches_nothing_lists_what_was_there(tiny: TinyModel, missing: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        find_targets(tiny("llama"), missing)
    text = str(caught.value)
    assert "mixer.targets" in text and missing[-1] in text
    assert "q, k, v, o" in text
    for name in ("q_proj", "o_proj", "gate_proj", "down_proj", "lm_head"):
        assert name in text


def test_feed_forward_layers_are_targets_by_name(tiny: TinyModel) -> None:
    found = find_targets(tiny("llama"), ["up_proj", "mlp.down_proj", "q"])
    assert [t.path.rsplit(".", 1)[1] for t in found[:3]] == ["q_proj", "up_proj", "down_proj"]
    assert (found[2].in_features, found[2].out_features) == (40, 32)


def test_a_convolution_like_projection_outside_attention_is_no_o(tiny: TinyModel) -> None:
    """GPT-2 calls the attention's output and the feed-forward's by one name, c_proj."""
    assert all(".attn." in t.path for t in find_targets(tiny("gpt2"), ["q", "k", "v", "o"]))


# model type -> (one layer's prefix, name -> roles) of state space and feed-forward, by reading the classes
MAMBA = {"in_proj": ("in",), "x_proj": ("x",), "dt_proj": ("dt",), "out_proj": ("out",)}
GATED = {"gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)}
OTHER_ROLES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "mamba": ("backbone.layers.0.mixer.", MAMBA),
    "falcon_mamba": ("backbone.layers.0.mixer.", MAMBA),
    "mamba2": ("backbone.layers.0.mixer.", {"in_proj": ("in",), "out_proj": ("out",)}),
    "llama": ("model.layers.0.mlp.", GATED),
    "qwen3": ("model.layers.0.mlp.", GATED),
    "phi3": ("model.layers.0.mlp.", {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}),
    "gpt_neox": ("gpt_neox.layers.0.mlp.", {"dense_h_to_4h": ("up",), "dense_4h_to_h": ("down",)}),
    "gpt2": ("transformer.h.0.mlp.", {"c_fc": ("up",), "c_proj": ("down",)}),
    "opt": ("model.decoder.layers.0.", {"fc1": ("up",), "fc2": ("down",)}),
    "mpt": ("transformer.blocks.0.ffn.", {"up_proj": ("up",), "down_proj": ("down",)}),
    "codegen": ("transformer.h.0.mlp.", {"fc_in": ("up",), "fc_out": ("down",)}),
    "t5": ("encoder.block.0.layer.1.DenseReluDense.", {"wi": ("up",), "wo": ("down",)}),
    "mt5": (
        "decoder.block.0.layer.2.DenseReluDense.",
        {"wi_0": ("gate",), "wi_1": ("up",), "wo": ("down",)},
    ),
}


@pytest.mark.parametrize("model_type", OTHER_ROLES)
def test_state_space_and_feed_forward_roles_are_found_in_every_layer(
    tiny: TinyModel, model_type: str
) -> None:
    prefix, layer = OTHER_ROLES[model_type]
    roles = {role for played in layer.values() for role in played}
    found = find_targets(tiny(model_type), sorted(roles))
    first = {t.path.removeprefix(prefix): t.roles for t in found if t.path.startswith(prefix)}
    assert first == layer
    stacks = 2 if model_type in ("t5", "mt5") else 1
    assert len(found) == 2 * stacks * len(layer), "two layers a stack, and nothing else"


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
def test_encoder_decoders_have_q_k_v_o_in_all_three_attentions(tiny: TinyModel, model_type: str) -> None:
    model = tiny(model_type)
    found = find_targets(model, ["q", "k", "v", "o"])
    places = {(t.path.split(".")[0], *t.path.rsplit(".", 2)[-2:]) for t in found}
    attentions = [("encoder", "SelfAttention"), ("decoder", "SelfAttention"), ("decoder", "EncDecAttention")]
    assert places == {(*place, role) for place in attentions for role in "qkvo"}
    assert len(found) == 2 * 3 * 4 and all(t.roles == (t.path[-1],) for t in found)
    cross = {t.path[-1]: t.block for t in found if "EncDec" in t.path and "block.0" in t.path}
    assert cross["k"] == cross["v"] and len({cross["q"], cross["k"], cross["o"]}) == 3


def test_a_part_of_a_fused_gate_and_up_is_refused(tiny: TinyModel) -> None:
    with pytest.raises(UserError, match="fused projection for gate, up, and only up") as caught:
        find_targets(tiny("phi3"), ["up", "down"])
    assert "name all of gate, up" in str(caught.value)


def test_a_role_of_another_kind_of_model_lists_the_roles_that_are_there(tiny: TinyModel) -> None:
    with pytest.raises(UserError, match="target q matches no projection") as caught:
        find_targets(tiny("falcon_mamba"), ["q", "in"])
    assert "choose from the roles in, x, dt, out and the linear layers dt_proj, in_proj" in str(caught.value)


def test_gate_and_up_share_a_block_and_state_space_projections_share_none(tiny: TinyModel) -> None:
    llama = {t.roles[0]: t for t in find_targets(tiny("llama"), ["gate", "up", "down"])[:3]}
    assert llama["gate"].block == llama["up"].block != llama["down"].block
    assert llama["gate"].shares_input and not llama["down"].shares_input
    mamba = find_targets(tiny("mamba"), ["in", "x", "dt", "out"])
    assert len({t.block for t in mamba}) == len(mamba) and not any(t.shares_input for t in mamba)


def test_projections_of_one_attention_share_a_block_and_o_has_its_own(tiny: TinyModel) -> None:
    blocks = {
        t.path.rsplit(".", 1)[1]: t.block for t in find_targets(tiny("llama"), ["q", "k", "v", "o"])[:4]
    }
    assert blocks["q_proj"] == blocks["k_proj"] == blocks["v_proj"] != blocks["o_proj"]


def test_mixers_are_attached_once_and_refused_where_absent(tiny: TinyModel) -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match="no mixers"):
        mixture_of(model)
    mixture = attach_mixers(model, MixerConfig(["q"], ["a"], rank=4))
    assert mixture_of(model) is mixture
    with pytest.raises(UserError, match="already"):
        attach_mixers(model, MixerConfig(["q"], ["a"], rank=4))
    with pytest.raises(UserError, match="choose from a"), route_to(model, "b"):
        pass
