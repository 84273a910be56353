"""PHATGOOSE: gates against a training written out by hand, scores against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dsmixer.baselines.fitting import Fit, mean_loss
from dsmixer.baselines.interface import Given
from dsmixer.baselines.phatgoose import Phatgoose, scores
from dsmixer.config.errors import UserError
from dsmixer.data.collate import collate

TARGET = "model.layers.1.self_attn.o_proj"
FITTING = Fit(steps=4, batch_size=8, learning_rate=5e-3, warmup_ratio=0.5)


class Gated(nn.Module):
    """``W u + s B A u * sigmoid(v . u)``, as the paper writes it."""

    def __init__(self, base, bank, expert):
        super().__init__()
        rank = bank.ranks[expert]
        self.base, self.s = base, bank.scaling[expert]
        self.A, self.B = bank.lora_A[expert, :rank].detach(), bank.lora_B[expert, :rank].detach().T
        self.v = nn.Parameter(torch.zeros(bank.in_features))

    def forward(self, u):
        return self.base(u) + self.s * (u @ self.A.T @ self.B.T) * torch.sigmoid(u @ self.v)[..., None]


def by_hand(model, bank, expert, micro):
    """The expert's vector after four full-batch steps of AdamW at 1/2, 1, 1, 1 of the peak rate."""
    attention = model.model.layers[1].self_attn
    attention.o_proj = gated = Gated(attention.o_proj, bank, expert)
    optimizer = torch.optim.AdamW([gated.v], lr=5e-3, weight_decay=0.0)
    for share in (0.5, 1.0, 1.0, 1.0):
        optimizer.param_groups[0]["lr"] = 5e-3 * share
        optimizer.zero_grad()
        mean_loss(model, micro).backward()
        optimizer.step()
    return gated.v.detach()


def test_gates_train_on_their_experts_rows_alone_and_then_route(make_mixture, load_base, rows, logits_of):
    mixture = make_mixture(targets=[TARGET], experts=["sums", "words"])
    fitted = Phatgoose(fitting=FITTING)(Given(mixture, rows))
    bank = mixture.mixers[TARGET].bank
    vectors = [
        by_hand(load_base("llama"), bank, e, collate(rows.store, [(r,) for r in rows.of(name)], 0))
        for e, name in enumerate(mixture.expert_names)
    ]
    model = load_base("llama")
    attention = model.model.layers[1].self_attn
    attention.o_proj = Routed(attention.o_proj, bank, torch.stack(vectors))
    found = logits_of(mixture.model, fitted.under(""))
    torch.testing.assert_close(found, logits_of(model), rtol=1e-4, atol=1e-5)
    assert fitted.num_trainable == 2 * 32 and fitted.num_steps == 2 * 4


class Routed(nn.Module):
    """All experts, their scores in float64 by the paper's formula."""

    def __init__(self, base, bank, v_ED):
        super().__init__()
        self.base, self.bank, self.v_ED = base, bank, v_ED

    def forward(self, u):
        weights = torch.softmax(scores_by_hand(u.reshape(-1, u.shape[-1]), self.v_ED), dim=1).float()
        y = self.base(u)
        for e, s in enumerate(self.bank.scaling):
            added = s * (u @ self.bank.lora_A[e].T @ self.bank.lora_B[e])
            y = y + weights[:, e].reshape(*u.shape[:-1], 1) * added
        return y


def scores_by_hand(u_TD, v_ED):
    def normed(x):
        x = x.double()
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()

    return normed(u_TD) @ normed(v_ED).T / math.sqrt(u_TD.shape[1])


def test_scores_are_dot_products_of_normed_vectors():
    generator = torch.Generator().manual_seed(1)
    u_TD, v_ED = torch.randn(5, 8, generator=generator), torch.randn(3, 8, generator=generator)
    torch.testing.assert_close(scores(u_TD, v_ED).double(), scores_by_hand(u_TD, v_ED), rtol=1e-5, atol=1e-5)
    assert not scores(u_TD, torch.zeros(1, 8)).any()


def test_the_two_largest_scores_share_a_token(make_mixture):
    bank = make_mixture(ranks={"sums": 2}).mixers[TARGET].bank
    generator = torch.Generator().manual_seed(1)
    u_TD, v_ED = torch.randn(6, 32, generator=generator), torch.randn(3, 32, generator=generator)
    found_TO = Phatgoose()._delta(bank, v_ED)(u_TD)
    for u_D, scores_E, found_O in zip(u_TD.double(), scores_by_hand(u_TD, v_ED), found_TO, strict=True):
        first, second = scores_E.argsort(descending=True)[:2].tolist()
        share = 1 / (1 + math.exp(scores_E[second] - scores_E[first]))
        wanted_O = share * spoken(bank, first, u_D) + (1 - share) * spoken(bank, second, u_D)
        torch.testing.assert_close(found_O.double(), wanted_O, rtol=1e-4, atol=1e-5)


def spoken(bank, e, u_D):
    """``s B A u`` in float64."""
    return bank.scaling[e] * bank.lora_B[e].double().T @ (bank.lora_A[e].double() @ u_D)


def test_an_expert_without_rows_is_named(make_mixture, rows):
    with pytest.raises(UserError, match="no training rows for the expert spare"):
        Phatgoose()(Given(make_mixture(), rows))
    with pytest.raises(UserError, match="no rows to train on"):
        Phatgoose()(Given(make_mixture()))
