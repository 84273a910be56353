"""Model operations against those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.case import Case
from tests.bench.operations import operations
from tests.bench.systems.llama import random_llama, step_ids

CASE = Case("train", width=128, layers=2, experts=6, rank=8, rows=2, sequence=16, vocabulary=96)


def _products(model: Any, *, backward: bool) -> int:
    """Operations of all matrix products but attention's, with a gradient to what the embedding puts out."""
    model.enable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=step_ids(CASE, 0), use_cache=False).logits
        if backward:
            out.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(
        count for operation, count in counts.items() if operation in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )


def _attention(case: Case) -> float:
    return operations(case, "base") - case.tokens * 4.0 * case.linear_weights


def test_a_step_of_the_frozen_base_takes_four_operations_a_weight_and_token() -> None:
    found = _products(random_llama(CASE), backward=True)
    assert found == operations(CASE, "base") - _attention(CASE)


def test_a_lora_takes_six_operations_a_weight_and_token_more() -> None:
    lora = LoraConfig(
        r=CASE.rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    found = _products(get_peft_model(random_llama(CASE), lora), backward=True)
    assert found == operations(CASE, "one") - _attention(CASE)


def test_a_mixture_takes_k_experts_and_its_routers() -> None:
    more = operations(CASE, "mixture") - operations(CASE, "base")
    assert more == pytest.approx(6 * CASE.tokens * (3 * CASE.expert_weights + CASE.router_weights))


def test_the_weights_are_those_of_the_model() -> None:
    model = random_llama(CASE)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert linear == CASE.linear_weights


def test_the_shape_of_an_8b_model_is_that_of_llama_3() -> None:
    case = Case("train", width=4096, layers=32, experts=6, rank=64, vocabulary=128256)
    assert (case.intermediate, case.heads, case.kv_heads, case.head_dim) == (14336, 32, 8, 128)
    assert 7.4e9 < case.linear_weights < 7.6e9
