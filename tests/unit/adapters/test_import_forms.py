"""Every form in which PEFT has saved a sum of low rank, against PEFT and against formulas in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.found_adapters import SMALL, enabled_thirds, outputs_with, tiny, train_by_chance
from torch import nn

from dsmixer.adapters.importing import import_adapters
from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.adapters.peft_format import read_adapter
from dsmixer.adapters.weight_files import read_pickle
from dsmixer.config.errors import UserError
from dsmixer.model.inject import route_to

IDS = torch.randint(3, 95, (2, 9), generator=torch.Generator().manual_seed(1))
Tensors = dict[str, torch.Tensor]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def trained(folder: Path, kind: str = "llama", config: Any = None, **options: Any) -> nn.Module:
    """What PEFT saves for a trained adapter, and the model that has it."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **options}
    adapted = peft.get_peft_model(tiny(kind), config or peft.LoraConfig(**settings))
    train_by_chance(adapted).save_pretrained(folder)
    return adapted


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return outputs_with(model, {"input_ids": IDS})


def imported(folder: Path, kind: str = "llama", **options: Any) -> torch.Tensor:
    """What the lone expert of a folder computes."""
    model = tiny(kind)
    import_adapters(model, {"law": folder}, **options)
    with route_to(model, "law"):
        return logits(model)


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]}),
        ("llama", {"target_modules": r".*_proj", "exclude_modules": r".*\.(mlp|1)\..*"}),
        ("llama", {"target_modules": ["o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
        ("llama", {"target_modules": ["model.layers.0.self_attn.k_proj", "1.self_attn.v_proj"]}),
        ("llama", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
        ("llama", {"target_modules": r"(?=.*attn).*[qk]_proj", "rank_pattern": {r"^model\..*\.1\..*": 3}}),
        ("llama", {"bias": "lora_only"}),
        ("llama", {"bias": "all"}),
        ("gpt2", {"target_modules": ["c_fc", "mlp.c_proj"], "fan_in_fan_out": True, "use_rslora": True}),
        ("qwen2", {"target_modules": ["q_proj"], "layers_to_transform": [3, 30]}),
        ("mistral", {"target_modules": None}),
    ],
)
def test_what_peft_targets_is_what_is_read(kind: str, options: Mapping[str, Any], tmp_path: Path) -> None:
    adapted = trained(tmp_path, kind, **options)
    ours = imported(tmp_path, kind)
    assert (ours - logits(tiny(kind))).abs().max() > 1e-3
    close(ours, logits(adapted))


def test_lora_on_the_output_head_is_an_expert_there(tmp_path: Path) -> None:
    adapted = trained(tmp_path, target_modules=["q_proj", "lm_head"])
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    close(imported(tmp_path), logits(adapted))


def adalora(**options: Any) -> peft.AdaLoraConfig:
    settings = {"init_r": 6, "lora_alpha": 5, "total_step": 10, "target_modules": ["q_proj", "v_proj"]}
    return peft.AdaLoraConfig(**{**settings, **options})


def test_adalora_is_a_sum_of_low_rank(tmp_path: Path) -> None:
    adapted = trained(tmp_path, config=adalora())
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_E" in load_file(
        tmp_path / "adapter_model.safetensors"
    )
    close(imported(tmp_path), logits(adapted))


def test_adalora_keeps_the_ranks_that_its_pattern_names_and_its_first_scale(tmp_path: Path) -> None:
    adapted = trained(tmp_path, config=adalora())
    kept = {"0.self_attn.q": 6, "0.self_attn.v": 0, "1.self_attn.q": 2, "1.self_attn.v": 5}
    adapted.peft_config["default"].rank_pattern = {
        f"model.layers.{name}_proj.lora_E": [i % 6 < rank for i in range(5, 11)]
        for name, rank in kept.items()
    }
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    ranks = {path: pair.rank for path, pair in read_adapter(tmp_path).pairs.items()}
    assert ranks == {f"model.layers.{name}_proj": rank for name, rank in kept.items()}
    close(imported(tmp_path), logits(again))


def first_form(folder: Path, enabled: list[bool], groups: int) -> tuple[Tensors, dict[str, Any]]:
    """A BLOOM adapter as PEFT 0.1 and 0.2 saved it."""
    draw = torch.Generator().manual_seed(3)
    num, config = sum(enabled), {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "enable_lora": enabled}
    config = {**config, "target_modules": ["query_key_value"], "merge_weights": False, "fan_in_fan_out": True}
    weights = {}
    for layer in range(2):
        key = f"base_model.model.transformer.h.{layer}.self_attention.query_key_value.lora_"
        weights[f"{key}A.weight"] = 0.1 * torch.randn(4 * num, 32, generator=draw)
        weights[f"{key}B.weight"] = torch.randn(32 * num, 4 * num // groups, 1, generator=draw)
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return weights, config


@pytest.mark.parametrize(
    ("enabled", "groups"),
    [([True, False, True], 2), ([True, True, False], 2), ([True, True, True], 3), ([True, True, True], 2)]
    + [([False, True, False], 1)],
)
def test_pefts_first_form_of_fused_projections_is_a_sum_of_low_rank(
    enabled: list[bool], groups: int, tmp_path: Path
) -> None:
    weights, config = first_form(tmp_path, enabled, groups)
    model = tiny("bloom")
    with enabled_thirds(model, weights, config, groups):
        theirs = logits(model)
    assert (theirs - logits(model)).abs().max() > 1e-3
    close(imported(tmp_path, "bloom"), theirs)


def test_the_first_form_that_its_shapes_deny_is_refused(tmp_path: Path) -> None:
    first_form(tmp_path, [True, False, True], 2)
    reconfigure(tmp_path, enable_lora=[True, True, True])
    with pytest.raises(UserError, match="not the factors of 3 parts of rank 4"):
        imported(tmp_path, "bloom")


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_form_of_its_own_comes_out_as_a_plain_adapter_that_peft_reads(kind: str, tmp_path: Path) -> None:
    if kind == "llama":
        trained(tmp_path / "adapter", config=adalora())
    else:
        first_form(tmp_path / "adapter", [True, False, True], 2)
    model = tiny(kind)
    save_mixture(
        import_adapters(model, {"law": tmp_path / "adapter"}), tmp_path / "mixture", base="someone/x"
    )
    alone = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "mixture" / "experts" / "law").eval()
    with route_to(model, "law"):
        close(logits(alone), logits(model))
    assert not read_adapter(tmp_path / "adapter").verbatim
    assert read_adapter(tmp_path / "mixture" / "experts" / "law").verbatim


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".my_run.weight"),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.removeprefix("base_model.model.").replace(".weight", ".default.weight"),
    ],
)
def test_keys_with_an_adapters_name_or_without_pefts_prefix_are_read(
    rename: Callable[[str], str], tmp_path: Path
) -> None:
    adapted = trained(tmp_path)
    rewrite(tmp_path, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    close(imported(tmp_path), logits(adapted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_pickle_of_tensors_is_read_like_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    trained(tmp_path)
    weights = {key: w.to(dtype) for key, w in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    ours = imported(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter_model.bin")
    assert torch.equal(imported(tmp_path), ours)
    read = read_pickle(tmp_path / "adapter_model.bin")
    assert all(torch.equal(read[key], weight.float()) for key, weight in weights.items())


def test_safetensors_are_preferred_to_a_pickle_beside_them(tmp_path: Path) -> None:
    adapted = trained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    close(imported(tmp_path), logits(adapted))


def test_a_bias_of_lora_b_that_is_zero_changes_nothing(tmp_path: Path) -> None:
    adapted = trained(tmp_path, "qwen2", lora_bias=True, layers_to_transform=[0])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.zero_()
    adapted.save_pretrained(tmp_path)
    close(imported(tmp_path, "qwen2"), logits(adapted))


@pytest.mark.parametrize("value", [None, False, {}, [], 0, ""])
def test_a_setting_that_is_not_known_and_not_set_is_harmless(value: Any, tmp_path: Path) -> None:
    adapted = trained(tmp_path)
    reconfigure(tmp_path, a_setting_of_tomorrow=value, qalora_group_size=16, fan_in_fan_out=None)
    close(imported(tmp_path), logits(adapted))


def test_all_linear_is_every_projection_but_the_head_and_a_lost_one_is_missed(tmp_path: Path) -> None:
    adapted = trained(tmp_path, target_modules="all-linear")
    reconfigure(tmp_path, target_modules="all-linear")
    close(imported(tmp_path), logits(adapted))
    rewrite(tmp_path, lambda tensors: {k: w for k, w in tensors.items() if "1.mlp.up_proj" not in k})
    with pytest.raises(UserError, match=r"no weights for model\.layers\.1\.mlp\.up_proj"):
        imported(tmp_path)


def test_one_pool_holds_all_forms_with_their_own_ranks_scales_and_layers(tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "plain": {"r": 3, "lora_alpha": 7},
        "stable": {"r": 9, "use_rslora": True, "target_modules": ["k_proj", "up_proj"]},
        "one_layer": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
        "ranks": {"rank_pattern": {"0.self_attn.q_proj": 8}, "alpha_pattern": {"v_proj": 40}},
        "values": {"config": adalora(target_modules=["down_proj"])},
    }
    theirs = {name: logits(trained(tmp_path / name, **given)) for name, given in options.items()}
    model = tiny("llama")
    mixture = import_adapters(model, {name: tmp_path / name for name in options})
    for name in options:
        with route_to(model, name):
            close(logits(model), theirs[name])
    with route_to(model, None):
        assert torch.equal(logits(model), logits(tiny("llama")))
    # where an adapter has nothing, both factors of its expert are zero
    bank = mixture.mixers["model.layers.0.self_attn.v_proj"].bank
    held = [name for e, name in enumerate(bank.names) if bank.lora_A[e].any() or bank.lora_B[e].any()]
    assert held == ["plain", "ranks"]


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": -6},
        {"lora_alpha": 6, "alpha_pattern": {"v_proj": -3}},
        {"init_lora_weights": "Gaussian"},
    ],
)
def test_a_negative_alpha_and_a_start_in_capitals_are_as_in_peft(
    options: Mapping[str, Any], tmp_path: Path
) -> None:
    adapted = trained(tmp_path / "law", **options)
    close(imported(tmp_path / "law"), logits(adapted))
    # and in a mixture's folder
    model = tiny("llama")
    save_mixture(import_adapters(model, {"law": tmp_path / "law"}), tmp_path / "mixture")
    again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "mixture" / "experts" / "law").eval()
    close(logits(again), logits(adapted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_are_read_in_each_type_of_floating_point(dtype: torch.dtype, tmp_path: Path) -> None:
    trained(tmp_path / "law")
    rewrite(tmp_path / "law", lambda tensors: {key: own.to(dtype) for key, own in tensors.items()})
    as_stored = load_file(tmp_path / "law" / "adapter_model.safetensors")
    pairs = read_adapter(tmp_path / "law").pairs
    for path, pair in pairs.items():
        for part, own in (("A", pair.a_RD), ("B", pair.b_OR)):
            stored = as_stored[f"base_model.model.{path}.lora_{part}.weight"]
            assert own.dtype == torch.float32 and torch.equal(own, stored.to(torch.float32))


def test_scales_stored_as_weights_are_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    rewrite(tmp_path, lambda ts: {key: own.abs().to(torch.float8_e8m0fnu) for key, own in ts.items()})
    with pytest.raises(UserError, match="stored as F8_E8M0, which can't be read"):
        read_adapter(tmp_path)


def test_lora_on_a_convolution_is_refused_as_one(tmp_path: Path) -> None:
    trained(tmp_path, "clip", target_modules=["q_proj", "patch_embedding"])
    with pytest.raises(UserError, match="patch_embedding is a convolution"):
        read_adapter(tmp_path)


def test_names_of_earlier_transformers_are_read_as_peft_reads_them(tmp_path: Path) -> None:
    adapted = trained(tmp_path / "law", "paligemma", target_modules=r".*language_model.*(q_proj|up_proj)")
    now, then = "model.language_model.layers", "language_model.model.layers"
    rewrite(tmp_path / "law", lambda tensors: {key.replace(now, then): own for key, own in tensors.items()})
    assert all(path.startswith(then) for path in read_adapter(tmp_path / "law").pairs)
    inputs = SMALL["paligemma"][1]
    model = tiny("paligemma")
    mixture = import_adapters(model, {"law": tmp_path / "law"})
    again = peft.PeftModel.from_pretrained(tiny("paligemma"), tmp_path / "law").eval()
    with torch.no_grad():
        with route_to(model, "law"):
            ours = outputs_with(model, inputs)
        close(ours, outputs_with(adapted, inputs))
        close(ours, outputs_with(again, inputs))
        assert (ours - outputs_with(tiny("paligemma"), inputs)).abs().max() > 1e-3
    save_mixture(mixture, tmp_path / "mixture")
    assert all(path.startswith(now) for path in read_adapter(tmp_path / "mixture/experts/law").pairs)


def test_names_that_no_release_had_stay_refused(tmp_path: Path) -> None:
    trained(tmp_path, "paligemma", target_modules=r".*language_model.*q_proj")
    now, never = "model.language_model.layers", "language_model.model.blocks"
    rewrite(tmp_path, lambda tensors: {key.replace(now, never): own for key, own in tensors.items()})
    with pytest.raises(UserError, match="this base has no module language_model.model.blocks"):
        import_adapters(tiny("paligemma"), {"law": tmp_path})
