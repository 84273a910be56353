"""PEFT: one LoRA, X-LoRA and Arrow, at the same rank on the same projections.

PEFT keeps adapters in float32. Over a base in 16 or 4 bits they are trained under ``torch.autocast``, as
transformers' Trainer does with ``bf16=True``; ``lora_without_autocast`` is the other way, and Arrow's only
one: its layer mixes dtypes under autocast and stops. Decoding over bfloat16, adapters are in bfloat16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import ArrowConfig, LoraConfig, XLoraConfig, create_arrow_model, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.xlora import model as xlora_model
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import nn

from dsmixer.training.heap import keep_freed_memory
from tests.bench.case import TARGETS, Case
from tests.bench.decoding import Decoding, prompt
from tests.bench.systems.interface import Built
from tests.bench.systems.llama import SCALING, autocast, expert_pair, place_of, random_llama
from tests.bench.systems.training import AdamWStep, mean_loss

LOADED = 3
"""Adapters that Arrow loads from a folder, by its own way; the others are added."""


def lora(case: Case) -> Built:
    """One adapter, the pool's first expert."""
    model = get_peft_model(random_llama(case), _one(case))
    _fill(model, case, {"default": 0})
    return _built(model, case)


def lora_without_autocast(case: Case) -> Built:
    """The same, its products in float32 whatever the base."""
    model = get_peft_model(random_llama(case), _one(case))
    _fill(model, case, {"default": 0})
    return _built(model, case, around=_as_it_is)


def lora_as_ours(case: Case) -> Built:
    """The same with what ours has around it: torch's fused AdamW, and freed memory kept on the CPU."""
    if case.device == "cpu":
        keep_freed_memory()
    model = get_peft_model(random_llama(case), _one(case))
    _fill(model, case, {"default": 0})
    return _built(model, case, fused=True)


def x_lora(case: Case) -> Built:
    """X-LoRA: the classifier and the adapters train, a scaling for each layer, token and adapter, K not zero.

    It reads the whole text anew for each token that it puts out, twice: it has no cache.
    """
    with _saved(case) as folder, _grown(case):
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=case.width,
            adapters={str(number): folder for number in range(case.experts)},
            layerwise_scalings=True,
            top_k_lora=case.top_k,
            use_trainable_adapters=True,
        )
        model = get_peft_model(random_llama(case), config).to(case.device)
    _fill(model, case, {str(number): number for number in range(case.experts)})
    # over layers that it does not know it does nothing, and says nothing
    forwards = [module.forward for module in _lora_layers(model).values()]
    if not all(isinstance(getattr(f, "__self__", None), XLoraLinearLayer) for f in forwards):
        raise NotImplementedError("X-LoRA puts no scalings on these layers")
    return _built(model, case, WholeText)


def arrow(case: Case) -> Built:
    """Arrow. It trains nothing by itself; in a step of training its experts do, as those of others."""
    with _saved(case) as folder:
        config = ArrowConfig(top_k=case.top_k, rng_seed=0)
        loaded = min(LOADED, case.experts)
        model = create_arrow_model(random_llama(case), [folder] * loaded, config).to(case.device)
    for number in range(loaded, case.experts):
        _add(model, case, f"task_{number}")
    _fill(model, case, {f"task_{number}": number for number in range(case.experts)})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_A.task_" in name or ".lora_B.task_" in name)
    return _built(model, case, around=_as_it_is)


class WholeText:
    """Decoding without a cache."""

    def __init__(self, model: nn.Module, rows: int, prompt_tokens: int, device: str) -> None:
        self.model, self.ids = model.eval(), prompt(rows, prompt_tokens, device)

    @torch.no_grad()
    def next_token(self) -> None:
        out: Any = self.model(input_ids=self.ids, use_cache=False)
        self.ids = torch.cat((self.ids, out.logits[:, -1:].argmax(-1)), dim=1)


def _as_it_is(case: Case) -> AbstractContextManager[None]:
    return nullcontext()


def _one(case: Case) -> LoraConfig:
    return LoraConfig(
        r=case.rank,
        lora_alpha=int(SCALING * case.rank),
        lora_dropout=0.0,
        target_modules=[f"{role}_proj" for role in TARGETS],
        task_type="CAUSAL_LM",
    )


@contextmanager
def _saved(case: Case) -> Iterator[str]:
    """The folder of an adapter of these shapes; its values are replaced after loading."""
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(random_llama(case), _one(case)).save_pretrained(folder)
        yield folder


@contextmanager
def _grown(case: Case) -> Iterator[None]:
    """X-LoRA's loading of adapters after the first done by ``_add``: nothing of it is measured."""
    load = xlora_model._load_adapter_into_lora_model

    def load_or_add(lora_model: Any, adapter_name: str, **rest: Any) -> None:
        if adapter_name == "0":
            load(lora_model=lora_model, adapter_name=adapter_name, **rest)
        else:
            lora_model.peft_config[adapter_name] = lora_model.peft_config["0"]
            _add(lora_model, case, adapter_name)

    xlora_model._load_adapter_into_lora_model = load_or_add
    try:
        yield
    finally:
        xlora_model._load_adapter_into_lora_model = load


def _add(model: nn.Module, case: Case, name: str) -> None:
    """One more adapter on every layer that has some.

    PEFT's own way walks through the whole model for each, and takes minutes for hundreds.
    """
    config = _one(case)
    for module in _lora_layers(model).values():
        module.update_layer(name, config.r, config.lora_alpha, config=config)


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def _fill(model: nn.Module, case: Case, experts: Mapping[str, int]) -> None:
    """Give adapters the values of the pool's experts."""
    filled = 0
    for path, module in _lora_layers(model).items():
        for name, number in experts.items():
            a_RD, b_OR = expert_pair(case, *place_of(path), number)
            # float32 also where an adapter was added in the dtype of the base
            module.lora_A[name].weight.data = a_RD
            module.lora_B[name].weight.data = b_OR
            filled += 1
    assert filled == len(experts) * case.layers * len(TARGETS), filled


def _built(
    model: Any,
    case: Case,
    decoding: Callable[[nn.Module, int, int, str], Any] = Decoding,
    around: Callable[[Case], AbstractContextManager[Any]] = autocast,
    *,
    fused: bool | None = None,
) -> Built:
    if case.what == "decode":
        if case.dtype == "bfloat16":
            model = model.to(torch.bfloat16)
        return Built(0, decode_token=decoding(model, case.rows, case.sequence, case.device).next_token)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = AdamWStep(case, parameters, mean_loss(model.train()), around, fused=fused)
    return Built(step.trained, step)
