"""The methods that neither PEFT nor a limit has, on numbers worked out by hand: PHATGOOSE, MoLE, MixLoRA."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dsmixer.baselines.adding import adding
from dsmixer.baselines.arrow import top_softmax
from dsmixer.baselines.fitting import GateLoss
from dsmixer.baselines.mixlora import FeedForward, MixLora
from dsmixer.baselines.mole import MoleGate
from dsmixer.baselines.phatgoose import Phatgoose, scores
from dsmixer.experts.bank import ExpertBank
from dsmixer.losses.auxiliary import MixLoraLoss
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.routing.context import RoutingContext
from dsmixer.routing.modes import Routing
from dsmixer.routing.router import Router


def bank_of(products: list[tuple[list[float], list[float]]]) -> ExpertBank:
    """Experts of rank 1 and scale 1 from a row of A and a column of B each."""
    widths = len(products[0][0]), len(products[0][1])
    bank = ExpertBank(
        [f"e{i}" for i in range(len(products))],
        *widths,
        ranks=[1] * len(products),
        alphas=[1] * len(products),
    )
    for e, (a_D, b_O) in enumerate(products):
        bank.set_expert(e, torch.tensor([a_D]), torch.tensor([b_O]).T)
    return bank


def test_phatgoose_scores_and_shares() -> None:
    """u = (3, 1) is normed to (1, -1), v = (2, 0) to (1, -1), (0, 4) to (-1, 1), (5, 5) to nought: scores
    2 / sqrt 2, -2 / sqrt 2 and 0. The first and the third speak, the first with 1 / (1 + exp(-sqrt 2)).
    Their outputs are 10 x 3 and 1 x 1."""
    u_TD, v_ED = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 4.0], [5.0, 5.0]])
    found_TE = scores(u_TD, v_ED)
    wanted = torch.tensor([[math.sqrt(2), -math.sqrt(2), 0.0]])
    torch.testing.assert_close(found_TE, wanted, rtol=1e-4, atol=1e-5)
    assert top_softmax(found_TE, 2).indices_TK.tolist() == [[0, 2]]
    bank = bank_of([([1.0, 0.0], [10.0]), ([1.0, 1.0], [100.0]), ([0.0, 1.0], [1.0])])
    share = 1 / (1 + math.exp(-math.sqrt(2)))
    assert Phatgoose()._delta(bank, v_ED)(u_TD).item() == pytest.approx(30 * share + (1 - share), rel=1e-4)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_mole_weighs_outputs_by_a_gate_that_reads_them(tau: float) -> None:
    """Outputs 3 and 1 are normed to (1, -1); e = tau (ln 3, 0) for the first expert and 0 for the second, so
    p = (3/4, 1/4) and 3 x 3/4 + 1 x 1/4 = 5/2."""
    bank = bank_of([([1.0], [3.0]), ([1.0], [1.0])])
    context = RoutingContext(2, Routing())
    gate = MoleGate(MixedLinear(nn.Linear(1, 1), bank, Router(2, 1), router_index=0, context=context), None)
    gate.e.data = torch.tensor([[tau * math.log(3), 0.0], [0.0, 0.0]])
    gate.log_tau.data.fill_(math.log(tau))
    assert gate(torch.ones(1, 1)).item() == pytest.approx(2.5, rel=1e-4)


def small_model() -> LlamaForCausalLM:
    """Width 2, inner width 1, relu; gate and up read x_1, down writes y_1."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=2,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        hidden_act="relu",
    )
    model = LlamaForCausalLM(config)
    mlp = model.model.layers[0].mlp
    for projection, weight in (
        ("gate_proj", [[1.0, 0]]),
        ("up_proj", [[1.0, 0]]),
        ("down_proj", [[1.0], [0]]),
    ):
        getattr(mlp, projection).weight.data = torch.tensor(weight)
    attach_mixers(
        model, MixerConfig(targets=["q"], experts=["a", "b"], rank=1)
    )  # which every method answers for
    return model


@torch.no_grad()
def test_mixlora_sends_a_token_through_whole_blocks() -> None:
    """x = (1, 0). The first expert adds 1 to the gate: relu(2) * 1 = 2, put out as (2, 0). The second adds 2
    to up and (0, 1) to down: relu(1) * 3 = 3, as (3, 3). The third is not among the two. With p in the ratio
    of 3 to 1: (3/4 x 2 + 1/4 x 3, 1/4 x 3)."""
    model = small_model()
    settings = MixLora(num_experts=3, top_k=2, rank=1, scaling=1.0)
    block = FeedForward(model, "model.layers.0.mlp", settings, 0, GateLoss(MixLoraLoss()))
    for parameter in block.parameters():
        parameter.zero_()
    adds = (
        ("gate_proj", 0, [1.0, 0], [1.0]),
        ("up_proj", 1, [1.0, 0], [2.0]),
        ("down_proj", 1, [1.0], [0, 1.0]),
    )
    for name, expert, a_D, b_O in adds:
        block.a_ERD[name][expert] = torch.tensor([a_D])
        block.b_EOR[name][expert] = torch.tensor([b_O]).T
    block.g_ED.copy_(torch.tensor([[math.log(3), 7.0], [0.0, 7.0], [-50.0, 7.0]]))
    with adding(model, block.deltas()), block.in_place():
        found = model.model.layers[0].mlp(torch.tensor([[[1.0, 0.0]]]))
    assert found.flatten().tolist() == pytest.approx([2.25, 0.75], rel=1e-5)
