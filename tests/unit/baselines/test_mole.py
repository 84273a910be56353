"""MoLE: its gate against a loop in float64, its balance loss against the formula."""

from __future__ import annotations

import math

import pytest
import torch

from dsmixer.baselines.fitting import Fit, GateLoss
from dsmixer.baselines.interface import Given
from dsmixer.baselines.mole import Mole, MoleGate
from dsmixer.baselines.uniform import Uniform
from dsmixer.data.collate import collate
from dsmixer.losses.mean_entropy import MoleBalanceLoss
from dsmixer.routing.modes import Routing, soft


def test_the_gate_reads_the_normed_outputs_of_all_experts(make_mixture):
    mixer = make_mixture(ranks={"sums": 2}).mixers["model.layers.0.self_attn.v_proj"]
    gate, bank = MoleGate(mixer, None), mixer.bank
    generator = torch.Generator().manual_seed(2)
    gate.e.data = torch.randn(gate.e.shape, generator=generator)
    gate.log_tau.data.fill_(math.log(2.5))
    x_TD = torch.randn(5, bank.in_features, generator=generator)
    for x_D, found_O in zip(x_TD.double(), gate(x_TD), strict=True):
        outputs = [
            s * (bank.lora_B[e].double().T @ (bank.lora_A[e].double() @ x_D))
            for e, s in enumerate(bank.scaling)
        ]
        joined = torch.cat(outputs)
        normed = (joined - joined.mean()) / (joined.var(unbiased=False) + 1e-5).sqrt()
        p = torch.softmax(gate.e.double() @ normed / 2.5, dim=0)
        wanted_O = sum(p[e] * outputs[e] for e in range(3))
        torch.testing.assert_close(found_O.double(), wanted_O, rtol=1e-4, atol=1e-5)


def test_the_balance_loss_is_that_of_the_mean_gate_over_gates_and_real_tokens(rows):
    micro = collate(rows.store, [(0,), (8,)], 0)
    real = micro.domain_ids.flatten() >= 0
    assert int((~real).sum()) > 0
    gate_loss = GateLoss(MoleBalanceLoss(alpha=0.5))
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randn(len(real), 3, generator=generator) for _ in range(2)]
    given = [logits.clone().requires_grad_() for logits in drawn]
    gate_loss.begin(micro)
    for logits in given:
        p = torch.softmax(logits, 1)
        gate_loss.record(logits, p, soft(p, Routing(mode="soft")), "decoder")
    gate_loss.take().backward()

    plain = [logits.double().requires_grad_() for logits in drawn]
    q = torch.stack([torch.softmax(logits, 1)[real].mean(0) for logits in plain]).mean(0)
    loss = -0.5 * q.log().sum()
    loss.backward()
    for logits, oracle in zip(given, plain, strict=True):
        torch.testing.assert_close(logits.grad.double(), oracle.grad, rtol=1e-4, atol=1e-8)


def test_only_gates_train_and_the_loss_falls(make_mixture, rows):
    mixture = make_mixture()
    before = {name: p.detach().clone() for name, p in mixture.model.named_parameters()}
    fitting = Fit(steps=12, batch_size=11, learning_rate=3e-2)
    fitted = Mole(fitting=fitting)(Given(mixture, rows))
    assert all(torch.equal(before[name], p) for name, p in mixture.model.named_parameters())
    per_mixer = [3 * 3 * mixer.bank.out_features + 1 for mixer in mixture.mixers.values()]
    assert fitted.num_trainable == sum(per_mixer) and fitted.num_steps == 12
    first, last = fitted.found["losses"]
    assert last < first - 0.01
    assert fitted.found == Mole(fitting=fitting)(Given(mixture, rows)).found


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_a_gate_that_has_not_trained_is_uniform(balance, make_mixture, rows, logits_of):
    mixture = make_mixture()
    still = Mole(balance=balance, fitting=Fit(steps=1, batch_size=2, learning_rate=0.0))(Given(mixture, rows))
    uniform = Uniform()(Given(mixture))
    torch.testing.assert_close(
        logits_of(mixture.model, still.under("")),
        logits_of(mixture.model, uniform.under("")),
        rtol=1e-4,
        atol=1e-5,
    )
