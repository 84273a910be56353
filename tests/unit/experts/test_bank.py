"""The stacked experts: scaling, padding, and a start that depends on nothing but names and seed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank, lora_scaling, padded_rank


def peft_layer(config: LoraConfig, width: int) -> Any:
    """PEFT's own LoRA layer on a linear one."""
    wrapped: Any = get_peft_model(nn.Sequential(nn.Linear(width, 4)), config)  # type: ignore[arg-type]
    return wrapped.base_model.model[0]


def make_bank(ranks: tuple[int, ...] = (6, 8, 64), **options: object) -> ExpertBank:
    names = [f"expert-{e}" for e in range(len(ranks))]
    alphas = [2.0 * rank for rank in ranks]
    return ExpertBank(names, 12, 20, ranks=ranks, alphas=alphas, **options)  # type: ignore[arg-type]


def test_rank_is_padded_to_a_multiple_of_eight() -> None:
    assert [padded_rank([r]) for r in (1, 6, 8, 9, 64)] == [8, 8, 8, 16, 64]
    assert padded_rank([1, 20, 3]) == 24


def test_scaling_equals_pefts_with_and_without_rslora() -> None:
    for rslora in (False, True):
        config = LoraConfig(r=6, lora_alpha=9, target_modules=["0"], use_rslora=rslora)
        layer = peft_layer(config, 4)
        assert math.isclose(lora_scaling(6, 9, rslora), layer.scaling["default"])


def test_start_has_pefts_distribution() -> None:
    """PEFT draws lora_A from a uniform whose bound we find by its own layer; lora_B is zero."""
    width = 256
    config = LoraConfig(r=64, target_modules=["0"])
    peft_a = peft_layer(config, width).lora_A.default.weight
    bank = ExpertBank(["one"], width, 4, ranks=[64], alphas=[1.0])
    bank.start(0, "layer")
    ours, theirs = bank.lora_A[0].detach(), peft_a.detach()
    assert torch.isclose(ours.abs().max(), theirs.abs().max(), rtol=1e-2)
    assert torch.isclose(ours.std(), theirs.std(), rtol=3e-2)
    assert abs(ours.mean()) < 4 * ours.std() / math.sqrt(ours.numel())
    assert not bank.lora_B.any()


def test_start_of_an_expert_does_not_depend_on_the_experts_beside_it() -> None:
    alone = ExpertBank(["law"], 12, 20, ranks=[6], alphas=[1.0])
    among = ExpertBank(["chess", "law"], 12, 20, ranks=[64, 6], alphas=[1.0, 1.0])
    for bank in (alone, among):
        bank.start(7, "model.layers.0.q")
    assert torch.equal(alone.lora_A[0, :6], among.lora_A[1, :6])
    among.start(7, "model.layers.1.q")
    assert not torch.equal(alone.lora_A[0, :6], among.lora_A[1, :6])


def test_rows_that_pad_a_smaller_rank_get_no_gradient_and_stay_zero() -> None:
    bank = make_bank()
    bank.start(0, "layer")
    with torch.no_grad():
        bank.set_expert(0, torch.randn(6, 12), torch.randn(20, 6))
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1)
    for _ in range(3):
        gate_TE = torch.rand(5, 3)
        bank(torch.randn(5, 12), Assignment(3, gate_TE=gate_TE)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not bank.lora_A[0, 6:].any() and not bank.lora_B[0, 6:].any()
    assert not bank.lora_A[1, 8:].any() and not bank.lora_B[1, 8:].any()
    assert bank.lora_A[0, :6].any() and bank.lora_B[1, :8].any()


def test_set_expert_takes_pefts_two_matrices() -> None:
    torch.manual_seed(0)
    bank = make_bank(rslora=True)
    lora_a, lora_b, x = torch.randn(6, 12), torch.randn(20, 6), torch.randn(4, 12)
    bank.set_expert(0, lora_a, lora_b)
    only_first = Assignment(3, indices_TK=torch.zeros(4, 1, dtype=torch.long), weights_TK=torch.ones(4, 1))
    expected = 12.0 / math.sqrt(6) * (x @ lora_a.T @ lora_b.T)
    torch.testing.assert_close(bank(x, only_first), expected, rtol=1e-5, atol=1e-4)


def test_num_weights_leaves_the_padding_out() -> None:
    assert make_bank().num_weights() == (6 + 8 + 64) * (12 + 20)


def test_the_meta_device_allocates_nothing_and_still_counts() -> None:
    bank = make_bank(device="meta")
    bank.start(0, "layer")
    assert bank.lora_A.is_meta and bank.num_weights() == 78 * 32


@pytest.mark.parametrize("compute", ["loop", "dense", "grouped", "blocked", "auto"])
def test_under_autocast_products_have_the_dtype_of_the_input(compute: str) -> None:
    bank = ExpertBank(["chess", "law"], 8, 8, ranks=[8, 8], alphas=[1.0, 1.0], compute=compute)
    nn.init.normal_(bank.lora_B)
    x_TD = torch.randn(5, 8, requires_grad=True)
    pairs = Assignment(2, indices_TK=torch.tensor([[0, 1]] * 5), weights_TK=torch.ones(5, 2))
    y_TO = bank(x_TD, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = bank(x_TD, pairs)
    under.sum().backward()
    assert torch.equal(under, y_TO) and x_TD.grad is not None
