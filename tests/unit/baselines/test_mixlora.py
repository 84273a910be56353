"""MixLoRA: its block against a loop in float64, its auxiliary loss against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, MambaConfig

from dsmixer.baselines.adding import adding
from dsmixer.baselines.fitting import Fit, GateLoss
from dsmixer.baselines.interface import Given
from dsmixer.baselines.mixlora import FeedForward, MixLora, feed_forward_blocks
from dsmixer.config.errors import UserError
from dsmixer.data.collate import collate
from dsmixer.losses.auxiliary import MixLoraLoss
from dsmixer.routing.modes import Routing, topk

SETTINGS = MixLora(
    num_experts=4, rank=3, scaling=1.5, fitting=Fit(steps=6, batch_size=11, learning_rate=1e-2)
)


@torch.no_grad()
def stirred_block(model, path):
    block = FeedForward(model, path, SETTINGS, 0, GateLoss(MixLoraLoss()))
    generator = torch.Generator().manual_seed(6)
    for parameter in block.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return block


@pytest.mark.parametrize("targets", [["q", "v"], ["v", "down"]])
def test_a_token_goes_through_whole_feed_forward_parts_of_two_experts(targets, make_mixture, load_base):
    model = make_mixture(targets=targets).model
    block = stirred_block(model, "model.layers.1.mlp")
    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    with adding(model, block.deltas()), block.in_place():
        found = model.model.layers[1].mlp(x)
    plain = load_base("llama").model.layers[1].mlp

    def weight(name, e):
        a, b = block.a_ERD[name][e].double(), block.b_EOR[name][e].double()
        return getattr(plain, name).weight.double() + 1.5 * b @ a

    for x_D, found_D in zip(x.reshape(-1, 32).double(), found.reshape(-1, 32), strict=True):
        p = torch.softmax(block.g_ED.double() @ x_D, dim=0)
        wanted = torch.zeros(32, dtype=torch.float64)
        for e in p.argsort(descending=True)[:2].tolist():
            inner = F.silu(weight("gate_proj", e) @ x_D) * (weight("up_proj", e) @ x_D)
            wanted += p[e] / p.topk(2).values.sum() * (weight("down_proj", e) @ inner)
        torch.testing.assert_close(found_D.double(), wanted, rtol=1e-3, atol=1e-4)


def test_the_auxiliary_loss_pools_routers_before_it_multiplies(rows):
    micro = collate(rows.store, [(0,), (8,)], 0)
    real = micro.domain_ids.flatten() >= 0
    gate_loss = GateLoss(MixLoraLoss(alpha=0.01))
    generator = torch.Generator().manual_seed(4)
    logits = [torch.randn(len(real), 4, generator=generator) for _ in range(3)]
    gate_loss.begin(micro)
    for each in logits:
        p = torch.softmax(each, 1)
        gate_loss.record(each, p, topk(p, Routing(mode="topk", top_k=2)), "decoder")
    pooled = torch.cat([each[real] for each in logits]).double()
    chosen = torch.zeros_like(pooled).scatter(1, pooled.topk(2).indices, 1.0).mean(0)
    wanted = 0.01 * 4 * (torch.softmax(pooled, 1).mean(0) * chosen).sum()
    assert float(gate_loss.take()) == pytest.approx(float(wanted), rel=1e-5)


def test_it_trains_its_own_experts_and_leaves_the_mixture_as_it_was(make_mixture, rows, logits_of):
    mixture = make_mixture()
    before = logits_of(mixture.model)
    fitted = SETTINGS(Given(mixture, rows))
    after = logits_of(mixture.model, fitted.under(""))
    assert torch.isfinite(after).all() and not torch.allclose(after, before, atol=1e-2)
    assert torch.equal(logits_of(mixture.model), before)
    assert "forward" not in mixture.model.model.layers[0].mlp.__dict__
    attention = sum(3 * (m.bank.in_features + m.bank.out_features) for m in mixture.mixers.values())
    experts = 4 * 3 * 3 * (32 + 48)
    assert fitted.num_trainable == attention + 2 * (experts + 4 * 32)


def test_a_model_without_feed_forward_parts_is_told():
    config = MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match="target down matches no projection"):
        feed_forward_blocks(AutoModelForCausalLM.from_config(config))
