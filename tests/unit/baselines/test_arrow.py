"""Arrow: held to PEFT's own."""

from __future__ import annotations

import pytest
import torch
from peft import ArrowConfig, create_arrow_model

from dsmixer.adapters.peft_format import LoraPair
from dsmixer.baselines.arrow import Arrow, prototype
from dsmixer.baselines.interface import Given


@pytest.mark.parametrize(("top_k", "temperature"), [(2, 1.0), (3, 0.5)])
def test_arrow_is_pefts_arrow(top_k, temperature, make_mixture, in_peft, load_base, logits_of):
    mixture = make_mixture(alphas={"spare": 3})
    _, folders = in_peft(mixture)
    fitted = Arrow(top_k=top_k, temperature=temperature)(Given(mixture))
    found = logits_of(mixture.model, fitted.under(""))
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    oracle = logits_of(create_arrow_model(load_base("llama"), folders, config).eval())
    torch.testing.assert_close(found, oracle, rtol=1e-5, atol=1e-5)
    assert all(0.5 < share <= 1 for share in fitted.found["leading_share"].values())


def test_a_prototype_is_the_top_right_singular_vector_of_the_product():
    generator = torch.Generator().manual_seed(0)
    pair = LoraPair(torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator), 1.0)
    v_D, share = prototype(pair)
    _, sizes, vt = torch.linalg.svd(pair.b_OR.double() @ pair.a_RD.double())
    torch.testing.assert_close(v_D.double().abs(), vt[0].abs(), rtol=1e-5, atol=1e-6)
    assert share == pytest.approx(float(sizes[0] ** 2 / sizes.square().sum()), rel=1e-5)


def test_an_expert_that_adds_nothing_attracts_no_token():
    v_D, share = prototype(LoraPair(torch.randn(3, 7), torch.zeros(5, 3), 1.0))
    assert not v_D.any() and share == 0.0
