"""Adapters that can't be an expert are refused, with the reason, and nothing is changed."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmixer.adapters.importing import import_adapters, read_pool
from dsmixer.config.errors import UserError


@pytest.fixture
def adapter(load_base, tmp_path):
    """A sound adapter on q and v, to be spoiled."""

    def make(kind="llama", **options):
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
        model = peft.get_peft_model(load_base(kind), peft.LoraConfig(**settings))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def refused(load_base, folder, *reasons, kind="llama", **options):
    model = load_base(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        import_adapters(model, {"law": folder}, **options)
    for reason in reasons:
        assert reason in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
        ({"trainable_token_indices": [3, 4]}, "token embeddings"),
        ({"init_lora_weights": "pissa"}, "'pissa' changed the base"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on an embedding"),
    ],
)
def test_lora_that_is_no_sum_of_low_rank_is_refused(options, reason, adapter, load_base):
    refused(load_base, adapter(**options), reason)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_were_trained_are_refused(bias, adapter, load_base):
    folder = adapter("gpt2", bias=bias, target_modules=["c_attn"])
    refused(load_base, folder, "c_attn", "is a trained bias", kind="gpt2")


def test_a_bias_of_lora_b_is_refused(adapter, load_base):
    folder = adapter(lora_bias=True)
    edit_weights(folder, lambda t: {k: torch.ones_like(v) if "bias" in k else v for k, v in t.items()})
    refused(load_base, folder, "lora_B.bias adds a constant")


def test_whole_weights_of_the_base_beside_the_adapter_are_refused(adapter, load_base):
    folder = adapter(target_modules=["q_proj", "lm_head"])
    refused(load_base, folder, "lm_head.base_layer.weight is a whole weight", "save_embedding_layers=False")


def test_other_peft_methods_are_refused(load_base, tmp_path):
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    peft.get_peft_model(load_base("llama"), config).save_pretrained(tmp_path)
    refused(load_base, tmp_path, "'IA3', and only LORA and ADALORA")


def test_keys_beyond_the_mixtures_targets_are_refused(adapter, load_base):
    folder = adapter(target_modules=["q_proj", "up_proj"])
    refused(load_base, folder, "has no mixer on model.layers.0.mlp.up_proj", targets=["q"])


def test_an_adapter_of_another_depth_is_refused(adapter, load_base):
    folder = adapter(target_modules=["q_proj"])
    edit_weights(folder, lambda t: {k.replace("layers.1", "layers.9"): v for k, v in t.items()})
    refused(load_base, folder, "has no module model.layers.9.self_attn.q_proj")


def test_an_adapter_of_another_width_is_refused(adapter, load_base):
    folder = adapter(target_modules=["q_proj"])
    edit_weights(folder, lambda t: {k: v[:, :24].contiguous() if "lora_A" in k else v for k, v in t.items()})
    refused(load_base, folder, "the adapter maps 24 to 32, the base 32 to 32")


def test_an_adapter_that_lost_a_layer_is_refused(adapter, load_base):
    folder = adapter()
    edit_weights(folder, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.v" not in k})
    refused(load_base, folder, "no weights for model.layers.1.self_attn.v_proj")


def test_weights_outside_target_modules_are_refused(adapter, load_base):
    folder = adapter()
    edit_config(folder, target_modules=["q_proj"])
    refused(load_base, folder, "target_modules leaves out")


def test_half_a_pair_is_refused(adapter, load_base):
    folder = adapter()
    edit_weights(
        folder, lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q_proj.lora_B" not in k}
    )
    refused(load_base, folder, "has no lora_B")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, adapter, load_base):
    def spoil(tensors):
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][1, 2] = value
        return tensors

    folder = adapter()
    edit_weights(folder, spoil)
    refused(load_base, folder, "holds NaN or infinity", "q_proj.lora_A")


def test_empty_weights_are_refused(adapter, load_base):
    folder = adapter()
    edit_weights(folder, lambda t: {k: v[:0] if "lora_B" in k else v for k, v in t.items()})
    refused(load_base, folder, "is empty")


def test_integer_weights_are_refused(adapter, load_base):
    folder = adapter()
    edit_weights(folder, lambda t: {k: v.to(torch.int8) for k, v in t.items()})
    refused(load_base, folder, "stored as I8")


@pytest.mark.parametrize("kept", [0, 5, 200, -4])
def test_a_file_cut_short_is_refused(kept, adapter, load_base):
    folder = adapter()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(load_base, folder, "damaged or cut short", str(path))


def test_a_rank_that_the_weights_do_not_have_is_refused(adapter, load_base):
    folder = adapter()
    edit_config(folder, r=8)
    refused(load_base, folder, "are not of rank 8")


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "four"},
        {"r": 0},
        {"lora_alpha": None},
        {"lora_alpha": 0},
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 3}},
        {"alpha_pattern": {"q_proj": "big"}},
        {"target_modules": "("},
        {"target_modules": 7},
    ],
)
def test_senseless_settings_are_refused(changes, adapter, load_base):
    folder = adapter()
    edit_config(folder, **changes)
    refused(load_base, folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_broken_configuration_is_refused(text, adapter, load_base):
    folder = adapter()
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    refused(load_base, folder, "adapter_config.json")


def test_a_folder_without_weights_is_refused(adapter, load_base):
    folder = adapter()
    (folder / "adapter_model.safetensors").unlink()
    refused(load_base, folder, "neither adapter_model.safetensors nor adapter_model.bin")


def test_a_missing_folder_is_told(load_base, tmp_path):
    refused(load_base, tmp_path / "nowhere", "no such folder", "nowhere")


@pytest.mark.parametrize("name", ["..", "../law", "a/b", "", ".hidden", "a\0b", "x" * 101, "law\n"])
def test_a_name_that_could_leave_the_folder_is_refused(name, adapter):
    with pytest.raises(UserError, match="can't be the name of an expert"):
        read_pool({name: adapter()})


def test_a_target_that_the_adapters_do_not_use_is_no_error(adapter, load_base):
    mixture = import_adapters(load_base("llama"), {"law": adapter()}, targets=["q", "k", "v", "o"])
    bank = mixture.mixers["model.layers.0.self_attn.k_proj"].bank
    assert not bank.lora_A.any() and not bank.lora_B.any()
