"""Adapters and configurations as found in the wild: each computes what PEFT computes, or is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.found_adapters import (
    SMALL,
    TEXT,
    enabled_thirds,
    outputs_with,
    random_model,
    tiny,
    train_by_chance,
)

from dsmixer.adapters.importing import import_adapters
from dsmixer.config.errors import UserError
from dsmixer.model.inject import route_to

FOUND = Path(__file__).resolve().parents[3] / "shared" / "adapters"

pytestmark = pytest.mark.skipif(not FOUND.is_dir(), reason="the adapters are not beside the checkout")


def lone_expert(model: torch.nn.Module, folder: Path, inputs: Mapping[str, Any]) -> torch.Tensor:
    """What the model computes with the adapter imported and every token sent to it."""
    import_adapters(model, {"found": folder})
    with torch.no_grad(), route_to(model, "found"):
        return outputs_with(model, inputs)


def same(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor, name: str) -> None:
    """Within 1e-5 of the oracle, and far from the base without the adapter."""
    difference, effect = (ours - theirs).abs().max().item(), (base - theirs).abs().max().item()
    print(f"{name}: {difference:.1e} from the oracle; the adapter moves outputs by {effect:.1e}")
    assert difference < 1e-5 < effect / 100


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    return {"input_ids": TEXT, "decoder_input_ids": TEXT} if kind == "flan-t5-small" else {"input_ids": TEXT}


@pytest.mark.parametrize("name", ["gpt2-fan-in-fan-out", "flan-t5-small"])
def test_a_found_adapter_computes_on_its_own_shapes_what_peft_computes(name: str) -> None:
    model, inputs = random_model(name), inputs_of(name)
    with torch.no_grad():
        base = outputs_with(model, inputs)
        adapted = peft.PeftModel.from_pretrained(model, FOUND / name).eval()
        theirs = outputs_with(adapted, inputs)
        model = adapted.unload()
        assert torch.equal(outputs_with(model, inputs), base)
    same(lone_expert(model, FOUND / name, inputs), theirs, base, name)


def test_pefts_first_form_computes_the_formula_that_peft_had_then() -> None:
    folder = FOUND / "bloom-560m-first-peft-bin"
    model, inputs = random_model("bloom-560m"), inputs_of("bloom")
    weights = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    with torch.no_grad():
        base = outputs_with(model, inputs)
        with enabled_thirds(model, weights, config):
            theirs = outputs_with(model, inputs)
    same(lone_expert(model, folder, inputs), theirs, base, folder.name)


ACCEPTED = {
    "clip-no-base-name": "clip",
    "distilbert-target-string": "distilbert",
    "gpt2-dotted-targets": "gpt2",
    "llama-12-keys": "llama",
    "mistral-null-fan-in": "mistral",
    "nemotron-8-keys": "llama",
    "paligemma-target-regex": "paligemma",
    "peft-adalora": "llama",
    "peft-rslora": "llama",
    "qwen2.5-vl-layer-names": "qwen2",
    "tinyllama-all-linear": "llama",
}
REFUSED = {
    "distilbert-modules-to-save": ("distilbert", "it replaces whole modules of the base"),
    "llama2-embed-and-head-targets": ("llama", "is LoRA on an embedding"),
    "peft-dora": ("llama", "it is DoRA"),
}


@pytest.fixture
def with_weights(tmp_path: Path) -> Callable[[str, str], tuple[Path, torch.Tensor]]:
    """A found configuration with weights that PEFT made by it, and what PEFT computes with them."""

    def make(name: str, kind: str) -> tuple[Path, torch.Tensor]:
        found = FOUND / "configs" / f"{name}.json"
        shutil.copyfile(found, tmp_path / "adapter_config.json")
        config = peft.PeftConfig.from_pretrained(tmp_path)
        config.task_type = None  # whose wrapper would save the classifier too
        adapted = train_by_chance(peft.get_peft_model(tiny(kind), config))
        adapted.save_pretrained(tmp_path)
        shutil.copyfile(found, tmp_path / "adapter_config.json")
        with torch.no_grad():
            return tmp_path, outputs_with(adapted, SMALL[kind][1])

    return make


@pytest.mark.parametrize(("name", "kind"), ACCEPTED.items())
def test_a_found_configuration_is_read_as_peft_reads_it(name: str, kind: str, with_weights: Any) -> None:
    folder, theirs = with_weights(name, kind)
    model, inputs = tiny(kind), SMALL[kind][1]
    with torch.no_grad():
        base = outputs_with(model, inputs)
    same(lone_expert(model, folder, inputs), theirs, base, name)


@pytest.mark.parametrize(("name", "kind", "reason"), [(n, *rest) for n, rest in REFUSED.items()])
def test_a_found_configuration_is_refused_with_its_reason(
    name: str, kind: str, reason: str, with_weights: Any
) -> None:
    folder, _ = with_weights(name, kind)
    with pytest.raises(UserError, match=reason):
        import_adapters(tiny(kind), {"found": folder})


def test_the_found_configuration_of_pefts_first_form_is_read(tmp_path: Path) -> None:
    found = FOUND / "configs" / "bloom-enable-lora.json"
    config, model, inputs = json.loads(found.read_text()), tiny("bloom"), SMALL["bloom"][1]
    draw = torch.Generator().manual_seed(3)
    weights = {}
    for layer in range(2):
        key = f"base_model.model.transformer.h.{layer}.self_attention.query_key_value.lora_"
        weights[f"{key}A.weight"] = 0.1 * torch.randn(16, 32, generator=draw)
        weights[f"{key}B.weight"] = 0.1 * torch.randn(64, 8, 1, generator=draw)
    torch.save(weights, tmp_path / "adapter_model.bin")
    shutil.copyfile(found, tmp_path / "adapter_config.json")
    with torch.no_grad():
        base = outputs_with(model, inputs)
        with enabled_thirds(model, weights, config):
            theirs = outputs_with(model, inputs)
    same(lone_expert(model, tmp_path, inputs), theirs, base, found.stem)


def test_everything_found_is_accounted_for() -> None:
    folders = {path.name for path in FOUND.iterdir() if path.is_dir()}
    assert folders == {"bloom-560m-first-peft-bin", "configs", "flan-t5-small", "gpt2-fan-in-fan-out"}
    configs = {path.stem for path in (FOUND / "configs").iterdir()}
    assert configs == {*ACCEPTED, *REFUSED, "bloom-enable-lora"}
