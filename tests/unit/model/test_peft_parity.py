"""One expert with weight 1 against PEFT's LoRA on the same model: outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from dsmixer.model.inject import Mixture, attach_mixers, route_to
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.routing.context import BatchRouting
from dsmixer.routing.modes import Routing

TinyModel = Callable[..., PreTrainedModel]

NAMES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "phi3": ["qkv_proj", "o_proj"],
}
RANKS, ALPHAS = {"law": 6, "chess": 8, "music": 1}, {"law": 12.0, "chess": 5.0, "music": 3.0}


def peft_of(model: PreTrainedModel, model_type: str, expert: str, rslora: bool) -> PeftModel:
    """PEFT's LoRA with random weights in both factors."""
    config = LoraConfig(
        r=RANKS[expert],
        lora_alpha=ALPHAS[expert],  # type: ignore[arg-type]
        target_modules=NAMES[model_type],
        use_rslora=rslora,
        fan_in_fan_out=model_type == "gpt2",
    )
    torch.manual_seed(len(expert))
    wrapped = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    assert isinstance(wrapped, PeftModel)
    return wrapped.double()


def peft_layer(wrapped: Any, path: str) -> Any:
    """PEFT's LoRA layer at a module path of the plain model."""
    return wrapped.base_model.model.get_submodule(path)


def mixture_with(
    model: PreTrainedModel, peft_models: dict[str, PeftModel], rslora: bool, compute: str
) -> Mixture:
    """Our mixture, whose experts are PEFT's."""
    config = MixerConfig(
        ["q", "k", "v", "o"], list(RANKS), ranks=RANKS, alphas=ALPHAS, rslora=rslora, compute=compute
    )
    mixture = attach_mixers(copy.deepcopy(model), config)
    for path, mixer in mixture.mixers.items():
        for name, wrapped in peft_models.items():
            layer = peft_layer(wrapped, path)
            index = mixture.expert_names.index(name)
            mixer.bank.set_expert(index, layer.lora_A.default.weight, layer.lora_B.default.weight)
    mixture.model.double()
    return mixture


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :2] = -100
    return ids, labels


@pytest.mark.parametrize("compute", ["loop", "dense", "grouped"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("model_type", NAMES)
def test_one_expert_equals_pefts_lora_in_outputs_and_gradients(
    tiny: TinyModel, model_type: str, rslora: bool, compute: str
) -> None:
    model = tiny(model_type)
    peft_models = {name: peft_of(model, model_type, name, rslora) for name in RANKS}
    mixture = mixture_with(model, peft_models, rslora, compute)
    ids, labels = tokens()
    for index, (name, wrapped) in enumerate(peft_models.items()):
        theirs = wrapped(input_ids=ids, labels=labels)
        theirs.loss.backward()
        mixture.model.zero_grad()
        with route_to(mixture.model, name):
            ours = mixture.model(input_ids=ids, labels=labels)
            ours.loss.backward()
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
        rank = RANKS[name]
        for path, mixer in mixture.mixers.items():
            layer = peft_layer(wrapped, path)
            grad_a, grad_b = mixer.bank.lora_A.grad, mixer.bank.lora_B.grad
            assert grad_a is not None and grad_b is not None
            wanted_a, wanted_b = layer.lora_A.default.weight.grad, layer.lora_B.default.weight.grad
            torch.testing.assert_close(grad_a[index, :rank], wanted_a, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(grad_b[index, :rank].T, wanted_b, rtol=1e-5, atol=1e-7)
            assert not grad_a[index, rank:].any() and not grad_b[index, rank:].any()
            others = [e for e in range(len(RANKS)) if e != index]
            assert not grad_a[others].any() and not grad_b[others].any()


@pytest.mark.parametrize("compute", ["dense", "grouped"])
def test_rows_of_different_experts_in_one_batch_equal_pefts_adapters_row_by_row(
    tiny: TinyModel, compute: str
) -> None:
    """Stage one's routing: a batch whose rows belong to different experts, ids given token by token."""
    model = tiny("llama")
    peft_models = {name: peft_of(model, "llama", name, rslora=False) for name in RANKS}
    mixture = mixture_with(model, peft_models, rslora=False, compute=compute)
    ids, _ = tokens()
    expert_ids_T = torch.arange(3).repeat_interleave(ids.shape[1])
    with (
        mixture.context.routed(Routing(mode="hard")),
        mixture.context.recording(BatchRouting(expert_ids_T=expert_ids_T)),
    ):
        logits = mixture.model(input_ids=ids).logits
    for row, wrapped in enumerate(peft_models.values()):
        theirs = wrapped(input_ids=ids[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], theirs, rtol=1e-5, atol=1e-5)


def test_dropout_acts_on_the_experts_input_in_training_only(tiny: TinyModel) -> None:
    """The mean over many masks is the output without dropout, and evaluation has none."""
    model = tiny("llama")
    config = MixerConfig(["q"], ["a"], rank=4, alpha=8, dropout=0.5)
    mixture = attach_mixers(model, config)
    mixer = next(iter(mixture.mixers.values()))
    for parameter in mixer.bank.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 32)
    with torch.no_grad(), route_to(model, "a"):
        plain = mixer(x)
        assert torch.equal(mixer(x), plain)
        mixer.train()
        masked = torch.stack([mixer(x) for _ in range(3000)])
    assert not torch.equal(masked[0], masked[1])
    error = (masked.mean(0) - plain).abs() / masked.std(0)
    assert error.max() < 6 / 3000**0.5
