"""MoE-PEFT's MoLA, run by the interpreter of an environment of its own: nothing of this package is imported.

The experts' layer, router and attention are MoE-PEFT's: eager attention, experts in float32. Its own trainer
does not clip; the step here does, as everyone's. It wants a dropout above 0; the dropout modules are put in
evaluation mode, so that no mask is drawn. Its routing loss is off, as by default.
"""

from __future__ import annotations

from typing import Any

import torch
from moe_peft import LLMBatchConfig, LLMModel, LLMModelInput, cache_factory
from moe_peft.adapters import MolaConfig
from moe_peft.models import from_pretrained

from tests.bench.case import TARGETS, Case
from tests.bench.decoding import prompt
from tests.bench.systems.interface import Built
from tests.bench.systems.llama import SCALING, expert_pair, random_llama, router_weight
from tests.bench.systems.training import AdamWStep

NAME = "mola"
TOKENS_TO_COME = 4096
"""Room of a cache that grows; no memory is taken for it."""


def build(case: Case) -> Built:
    """Experts and routers train."""
    model = _model(case)
    if case.what == "decode":
        return Built(0, decode_token=_Decoding(model, case).next_token)
    # what its trainer hands to the optimizer
    parameters = [tensor for tensor in model.get_adapter_weight_dict(NAME).values() if tensor.requires_grad]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        (output,) = model.forward(
            LLMModelInput(batch_configs_=_rows(case), batch_tokens_=ids, batch_labels_=ids)
        )
        return output.loss

    step = AdamWStep(case, parameters, loss_of)
    return Built(step.trained, step)


class _Decoding:
    """Greedy, with its dynamic cache."""

    def __init__(self, model: LLMModel, case: Case) -> None:
        self.model, self.case = model, case
        config = model.model_.model_config()
        self.cache = cache_factory("dynamic", config, case.rows, case.sequence + TOKENS_TO_COME)
        self.ids = prompt(case.rows, case.sequence, case.device)
        self.next_token()

    @torch.inference_mode()
    def next_token(self) -> None:
        asked = LLMModelInput(batch_configs_=_rows(self.case), batch_tokens_=self.ids, inference_mode_=True)
        (output,) = self.model.forward(asked, self.cache)
        self.ids = output.logits[:, -1:].argmax(-1)


def _rows(case: Case) -> list[LLMBatchConfig]:
    return [LLMBatchConfig(NAME, 0, case.rows)]


def _model(case: Case) -> LLMModel:
    """The base taken over, and the pool with the weights that every system has."""
    if case.dtype == "nf4":
        raise NotImplementedError("its environment has no bitsandbytes")
    model = LLMModel(from_pretrained(random_llama(case), attn_impl="eager", device=case.device))
    config = MolaConfig.from_config(
        {
            "name": NAME,
            "task_name": "casual",
            "r": case.rank,
            "lora_alpha": int(SCALING * case.rank),
            "lora_dropout": 0.05,
            "target_modules": [f"{role}_proj" for role in TARGETS],
            "num_experts": case.experts,
            "top_k": case.top_k,
        }
    )
    model.init_adapter(config.check())
    for number, layer in enumerate(model.model_.layers_):
        _fill(layer, case, number)
    return model


@torch.no_grad()
def _fill(layer: Any, case: Case, number: int) -> None:
    attention, _ = layer.state_dict()
    for role in TARGETS:
        linear = attention[f"{role}_proj"]
        linear.moes_[NAME].gate_.weight.copy_(router_weight(case, number, role))
        for expert in range(case.experts):
            lora = linear.loras_[f"moe.{NAME}.experts.{expert}"]
            a_RD, b_OR = expert_pair(case, number, role, expert)
            lora.lora_a_.weight.copy_(a_RD)
            lora.lora_b_.weight.copy_(b_OR)
            lora.dropout_.eval()
