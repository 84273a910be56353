"""Methods that make one LoRA of all experts: held to PEFT's weighted merges, and to float64."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from dsmixer.baselines.interface import Given
from dsmixer.baselines.merged import factor_sum, write_merged
from dsmixer.baselines.uniform import Own, Uniform, UniformFactors
from dsmixer.config.errors import UserError
from dsmixer.model.inject import attach_mixers, route_by, route_to
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.placement.exchange import LocalExchange, Placement
from dsmixer.placement.layout import ExpertLayout
from dsmixer.routing.modes import Routing

UNEVEN = {"ranks": {"sums": 2, "words": 6}, "alphas": {"spare": 3}}


def merged_by_peft(model, names, weights, kind):
    model.add_weighted_adapter(list(names), weights, "merged", combination_type=kind)
    model.set_adapter("merged")
    return model


def test_uniform_is_pefts_cat_and_the_uniform_routing_for_experts_of_unlike_ranks(
    make_mixture, in_peft, logits_of
):
    mixture = make_mixture(**UNEVEN)
    fitted = Uniform()(Given(mixture))
    found = logits_of(mixture.model, fitted.under(""))
    peft_model, _ = in_peft(mixture)
    oracle = logits_of(merged_by_peft(peft_model, mixture.expert_names, [1 / 3] * 3, "cat"))
    torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-5)
    routed = logits_of(mixture.model, route_by(mixture.model, Routing(mode="uniform")))
    torch.testing.assert_close(found, routed, rtol=1e-4, atol=1e-5)
    assert fitted.merged.rank == 2 + 6 + 4 and fitted.num_trainable == 0


def test_uniform_factors_is_pefts_linear_with_the_squares_of_the_weights(make_mixture, in_peft, logits_of):
    mixture = make_mixture(alphas={"spare": 3})
    found = logits_of(mixture.model, UniformFactors()(Given(mixture)).under(""))
    peft_model, _ = in_peft(mixture)
    oracle = logits_of(merged_by_peft(peft_model, mixture.expert_names, [1 / 9] * 3, "linear"))
    torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, logits_of(mixture.model, Uniform()(Given(mixture)).under("")), atol=1e-2)


def test_factor_sums_of_unlike_and_negative_weights_keep_their_cross_terms(make_mixture):
    mixture = make_mixture(alphas={"spare": 3})
    weights = [0.5, -1.25, 0.75]
    for path, (a_RD, b_OR) in factor_sum(mixture, weights).matrices.items():
        bank = mixture.mixers[path].bank
        wanted = torch.zeros(bank.out_features, bank.in_features, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                scale = (bank.scaling[i] * bank.scaling[j]) ** 0.5
                product = bank.lora_B[i, :4].double().T @ bank.lora_A[j, :4].double()
                wanted += weights[i] * weights[j] * scale * product
        torch.testing.assert_close(b_OR.double() @ a_RD.double(), wanted, rtol=1e-5, atol=1e-6)


def test_matrices_of_unlike_ranks_are_not_added(make_mixture):
    with pytest.raises(UserError, match="ranks 2, 6, 4.*\n.*use uniform"):
        UniformFactors()(Given(make_mixture(**UNEVEN)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merged_lora_is_a_plain_peft_adapter(kind, make_mixture, load_base, logits_of, tmp_path):
    targets = ["q", "v", "o"] if kind == "llama" else ["q", "k", "v", "o"]
    mixture = make_mixture(kind, targets=targets, **UNEVEN)
    fitted = Uniform()(Given(mixture))
    write_merged(fitted.merged, mixture, tmp_path / "uniform", base="base")
    oracle = logits_of(PeftModel.from_pretrained(load_base(kind), tmp_path / "uniform").eval())
    torch.testing.assert_close(logits_of(mixture.model, fitted.under("")), oracle, rtol=1e-4, atol=1e-5)


def test_own_is_the_expert_it_is_told(make_mixture, in_peft, logits_of):
    mixture = make_mixture(**UNEVEN)
    fitted = Own()(Given(mixture))
    peft_model, _ = in_peft(mixture)
    peft_model.set_adapter("words")
    found = logits_of(mixture.model, fitted.under("words"))
    torch.testing.assert_close(found, logits_of(peft_model), rtol=1e-4, atol=1e-5)
    assert fitted.told == {"sums", "words", "spare"}


def test_experts_that_are_spread_over_processes_are_refused(load_base):
    placement = Placement(ExpertLayout(((0, 2), (1,))), LocalExchange())
    config = MixerConfig(targets=["q"], experts=["law", "chess", "song"], rank=2)
    with pytest.raises(UserError, match="spread over processes"):
        Given(attach_mixers(load_base("llama"), config, placement))


def test_a_model_is_what_it_was_after_a_method(make_mixture, load_base, logits_of):
    mixture = make_mixture()
    before = logits_of(mixture.model)
    with Uniform()(Given(mixture)).under(""):
        assert not torch.equal(logits_of(mixture.model), before)
    assert torch.equal(logits_of(mixture.model), before)
    assert torch.equal(logits_of(mixture.model, route_to(mixture.model, None)), logits_of(load_base("llama")))
