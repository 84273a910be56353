"""Saved experts against PEFT, and PEFT's adapters against what is read."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from dsmixer.adapters.importing import import_adapters
from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.adapters.peft_format import read_adapter
from dsmixer.model.inject import mixture_of, route_to


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"targets": ["q", "v"], "router": "per_block"}),
        ("llama", {"rslora": True}),
        ("llama", {"targets": ["k", "mlp.up_proj"]}),
        ("gpt2", {"targets": ["q", "k", "v"]}),
        ("gpt2", {"targets": ["q", "k", "v", "o"]}),
        ("phi3", {"targets": ["q", "k", "v", "o"]}),
    ],
)
def test_peft_computes_the_same_with_a_saved_expert_alone(
    kind, options, make_mixture, load_base, token_ids, tmp_path
):
    mixture = make_mixture(kind, **options)
    save_mixture(mixture, tmp_path / "mixture")
    with torch.no_grad():
        base_logits = load_base(kind)(token_ids).logits
        for name in mixture.expert_names:
            folder = tmp_path / "mixture" / "experts" / name
            alone = peft.PeftModel.from_pretrained(load_base(kind), folder).eval()
            with route_to(mixture.model, name):
                ours = mixture.model(token_ids).logits
            assert (ours - base_logits).abs().max() > 1e-2
            close(ours, alone(token_ids).logits)


def test_gpt2_is_saved_as_fan_in_fan_out_and_merges_in_peft(make_mixture, load_base, token_ids, tmp_path):
    mixture = make_mixture("gpt2")
    save_mixture(mixture, tmp_path / "mixture")
    folder = tmp_path / "mixture" / "experts" / "law"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    # the MLP of GPT-2 has a c_proj too, which must not be named
    assert config["target_modules"] == ["attn.c_proj", "c_attn"]
    merged = peft.PeftModel.from_pretrained(load_base("gpt2"), folder).merge_and_unload().eval()
    with torch.no_grad(), route_to(mixture.model, "law"):
        close(mixture.model(token_ids).logits, merged(token_ids).logits)


def test_a_saved_expert_has_its_own_rank_and_the_usual_keys(make_mixture, tmp_path):
    save_mixture(make_mixture("llama"), tmp_path / "mixture")
    for name, rank in (("law", 4), ("chess", 6)):
        tensors = load_file(tmp_path / "mixture" / "experts" / name / "adapter_model.safetensors")
        assert len(tensors) == 2 * 4 * 2
        key = "base_model.model.model.layers.1.self_attn.k_proj.lora_{}.weight"
        assert tensors[key.format("A")].shape == (rank, 32)
        assert tensors[key.format("B")].shape == (16, rank)


def peft_adapter(model, folder, **options):
    """What PEFT saves for a trained LoRA, and the model that has it."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **options})
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}),
        ("llama", {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0]}),
        ("llama", {"target_modules": "all-linear"}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {"v_proj": 7, "layers.0.self_attn.q_proj": 2},
                "alpha_pattern": {"v_proj": 5},
            },
        ),
        ("gpt2", {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}),
        ("phi3", {"target_modules": ["qkv_proj", "o_proj"]}),
    ],
)
def test_an_adapter_that_peft_saved_computes_the_same_as_an_expert(
    kind, options, load_base, token_ids, tmp_path
):
    adapted = peft_adapter(load_base(kind), tmp_path / "adapter", **options)
    mixture = import_adapters(load_base(kind), {"law": tmp_path / "adapter"})
    with torch.no_grad(), route_to(mixture.model, "law"):
        close(mixture.model(token_ids).logits, adapted(token_ids).logits)
    with torch.no_grad(), route_to(mixture.model, None):
        close(mixture.model(token_ids).logits, load_base(kind)(token_ids).logits)


def test_adapters_of_other_ranks_targets_and_scaling_form_one_frozen_pool(load_base, token_ids, tmp_path):
    models = {
        "law": peft_adapter(load_base("llama"), tmp_path / "law", target_modules=["q_proj", "v_proj"]),
        "chess": peft_adapter(
            load_base("llama"), tmp_path / "chess", r=9, use_rslora=True, target_modules=["v_proj", "o_proj"]
        ),
    }
    model = load_base("llama")
    mixture = import_adapters(model, {name: tmp_path / name for name in models}, top_k=1)
    assert mixture_of(model) is mixture and mixture.config.ranks == {"law": 4, "chess": 9}
    for name, adapted in models.items():
        with torch.no_grad(), route_to(model, name):
            close(model(token_ids).logits, adapted(token_ids).logits)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in mixture.router_parameters()}
    assert mixture.config.default_routing().top_k == 1


def test_imported_experts_survive_saving_as_a_mixture(load_base, token_ids, tmp_path):
    adapted = peft_adapter(
        load_base("llama"), tmp_path / "a", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 7}
    )
    save_mixture(import_adapters(load_base("llama"), {"law": tmp_path / "a"}), tmp_path / "mixture")
    alone = peft.PeftModel.from_pretrained(load_base("llama"), tmp_path / "mixture" / "experts" / "law")
    with torch.no_grad():
        close(alone.eval()(token_ids).logits, adapted(token_ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_peft_saved_is_read_back_identically(dtype, load_base, tmp_path):
    adapted = peft_adapter(load_base("llama").to(dtype), tmp_path / "a", target_modules=["q_proj", "k_proj"])
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path / "a")
    assert len(saved) == 2 * len(adapter.pairs) == 8
    for path, pair in adapter.pairs.items():
        layer = adapted.base_model.model.get_submodule(path)
        assert torch.equal(pair.a_RD, layer.lora_A["default"].weight.detach().float())
        assert torch.equal(pair.b_OR, layer.lora_B["default"].weight.detach().float())
        assert pair.scaling == layer.scaling["default"]
