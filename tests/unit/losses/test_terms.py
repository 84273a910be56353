"""Several losses as one, over the steps of a training with several routers, in several layouts."""

from __future__ import annotations

import pytest
import torch

from dsmixer.losses.auxiliary import MixLoraLoss, SwitchLoss
from dsmixer.losses.balance import routing_losses
from dsmixer.losses.interface import Extras
from dsmixer.losses.mean_entropy import MoleBalanceLoss
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.losses.terms import RoutingTerms, published
from dsmixer.losses.token_losses import ZLoss
from dsmixer.routing.modes import Routing, topk
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics

NUM_ROUTERS, NUM_TOKENS, NUM_EXPERTS, TOP_K = 3, 8, 4, 2


def output_of(logits_TE: torch.Tensor) -> RouterOutput:
    p_TE = torch.softmax(logits_TE, dim=1)
    return RouterOutput(logits_TE, p_TE, topk(p_TE, Routing(top_k=TOP_K)), None)


def draw_logits(seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_ROUTERS, NUM_TOKENS, NUM_EXPERTS, generator=rng).requires_grad_()


def count(terms: RoutingTerms, logits_MTE: torch.Tensor, parts: list[slice]) -> RoutingStatistics:
    statistics = RoutingStatistics(NUM_ROUTERS, NUM_EXPERTS, smooth_temperature=terms.smooth_temperature)
    for part in parts:
        for router in range(NUM_ROUTERS):
            statistics.record(router, output_of(logits_MTE[router, part]), None)
    return statistics


def step_gradient(
    terms: RoutingTerms, logits_MTE: torch.Tensor, usage_NME: torch.Tensor, parts: list[slice]
) -> torch.Tensor:
    """Of the mean over routers and tokens, as the loop scales it, in micro-batches."""
    rng = torch.Generator().manual_seed(5)
    labels_T = torch.randint(-1, NUM_EXPERTS, (NUM_TOKENS,), generator=rng)
    outputs_MTKO = torch.randn(NUM_ROUTERS, NUM_TOKENS, TOP_K, 5, generator=rng)
    leaf = logits_MTE.detach().requires_grad_()
    for part in parts:
        for m in range(NUM_ROUTERS):
            extras = Extras(labels_T[part], outputs_MTKO[m, part].requires_grad_())
            loss = terms(output_of(leaf[m, part]), usage_NME[:, m], 1.0, extras)
            (loss / (NUM_ROUTERS * NUM_TOKENS)).backward()
    assert leaf.grad is not None
    return leaf.grad


ONE, FOUR = [slice(0, 8)], [slice(0, 1), slice(1, 2), slice(2, 6), slice(6, 8)]


@pytest.mark.parametrize("method", list(published))
def test_a_methods_steps_are_the_same_in_one_micro_batch_and_in_four(method: str) -> None:
    terms = RoutingTerms(published[method])
    before = draw_logits(1)
    usages = [terms.next_usage(count(terms, before, parts)) for parts in (ONE, FOUR)]
    torch.testing.assert_close(usages[0], usages[1])
    assert usages[0].shape == terms.first_usage(NUM_ROUTERS, NUM_EXPERTS).shape
    gradients = [step_gradient(terms, draw_logits(), usages[0], parts) for parts in (ONE, FOUR)]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].any()


def test_mole_over_all_routers_has_the_gradient_of_the_pooled_formula() -> None:
    """-0.5 log prod q with q the mean over routers and tokens: no router sees another, yet it is exact."""
    terms, logits = RoutingTerms(published["mole"]), draw_logits()
    found = step_gradient(terms, logits, terms.next_usage(count(terms, logits, ONE)), FOUR)
    (-0.5 * logits.softmax(2).mean((0, 1)).log().sum()).backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-4, atol=1e-6)


def test_mixlora_over_all_routers_has_the_gradient_of_the_pooled_formula() -> None:
    terms, logits = RoutingTerms((MixLoraLoss(alpha=1.0),)), draw_logits()
    found = step_gradient(terms, logits, terms.next_usage(count(terms, logits, ONE)), FOUR)
    p_NE = logits.softmax(2).flatten(0, 1)
    hits = torch.zeros(NUM_EXPERTS)
    for row in p_NE.tolist():
        for i in sorted(range(NUM_EXPERTS), key=lambda i, row=row: -row[i])[:TOP_K]:
            hits[i] += 1 / len(p_NE)
    (NUM_EXPERTS * p_NE.mean(0) @ hits).backward()
    torch.testing.assert_close(found, logits.grad)


def test_usage_of_each_kind_is_the_mean_it_is_called_and_1_over_E_for_an_idle_router() -> None:
    terms = RoutingTerms((RoutingSpecializationLoss(), *published["ds_moe"], MixLoraLoss(), ZLoss()))
    statistics = RoutingStatistics(2, 2)
    p_TE = torch.tensor([[0.6, 0.4], [0.2, 0.8]])
    choice = topk(p_TE, Routing(top_k=1))
    statistics.record(0, RouterOutput(p_TE.log(), p_TE, choice, None), None)
    usage_NME = terms.next_usage(statistics)
    even = torch.tensor([0.5, 0.5])
    torch.testing.assert_close(usage_NME[0], torch.stack([torch.tensor([0.5, 0.5]), even]))
    torch.testing.assert_close(usage_NME[1], torch.stack([torch.tensor([0.4, 0.6]), even]))
    torch.testing.assert_close(usage_NME[2], torch.stack([even, even]))
    torch.testing.assert_close(terms.first_usage(2, 2), torch.full((4, 2, 2), 0.5))


def test_terms_add_up_and_each_gets_its_own_usage() -> None:
    terms = RoutingTerms((SwitchLoss(), ZLoss(), MoleBalanceLoss()))
    output, usage_NE = output_of(draw_logits()[0]), torch.rand(3, NUM_EXPERTS)
    apart = sum(t(output, u, 0.3).item() for t, u in zip(terms.terms, usage_NE, strict=True))
    assert terms(output, usage_NE, 0.3).item() == pytest.approx(apart, rel=1e-5)


def test_what_a_method_needs_is_known_before_it_trains() -> None:
    needs = {name: RoutingTerms(terms).needs for name, terms in published.items()}
    assert needs.pop("aesl") == {"outputs_TKO"} and needs.pop("meteora") == {"labels_T"}
    assert not any(needs.values())
    assert RoutingTerms(published["mole"]).smooth_temperature == 1.0
    assert RoutingTerms(published["switch"]).smooth_temperature is None
    assert RoutingTerms(published["gmoe"]).learned(6) == {"gmoe_poisson_rate": 1.5, "gmoe_normal_width": 3.0}
    assert {type(t) for terms in published.values() for t in terms} <= set(routing_losses.values())


def test_two_temperatures_of_one_usage_are_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"\[0.5, 1.0\].*same smooth_temperature"):
        RoutingTerms((MoleBalanceLoss(), SwitchLoss(usage="smooth", smooth_temperature=0.5)))
