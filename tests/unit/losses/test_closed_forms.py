"""The losses of other methods on examples worked out by hand, and their extreme values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dsmixer.losses.aesl import AeslOrthogonalityLoss, AeslVarianceLoss
from dsmixer.losses.gmoe import GmoeNormalLoss, GmoePoissonLoss
from dsmixer.losses.interface import NOTHING, Extras
from dsmixer.losses.mean_entropy import MoleBalanceLoss, MutualInformationLoss
from dsmixer.losses.supervised_gate import SupervisedGateLoss
from dsmixer.losses.token_losses import TsallisEntropyLoss, ZLoss
from dsmixer.routing.modes import Routing, top_p, topk
from dsmixer.routing.statistics import RouterOutput


def output_of(p: list[list[float]], top_k: int = 2) -> RouterOutput:
    p_TE = torch.tensor(p, dtype=torch.float64)
    return RouterOutput(p_TE.log(), p_TE, topk(p_TE, Routing(top_k=top_k)), None)


def value_of(loss: Any, p: list[list[float]], extras: Extras = NOTHING, top_k: int = 2) -> float:
    """Of the micro-batch by itself, summed over tokens."""
    nowhere = torch.full((len(p[0]),), math.nan, dtype=torch.float64)
    return loss(output_of(p, top_k), nowhere, 1.0, extras).item()


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


TWO = [[0.6, 0.4], [0.2, 0.8]]
UNIFORM = [[0.25] * 4] * 3


def test_z_loss_squares_the_log_of_the_sum() -> None:
    """Logits (0, ln 3): their sum of exponentials is 4. A token of probabilities as logits costs nothing."""
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    p_TE = logits.softmax(1)
    output = RouterOutput(logits, p_TE, topk(p_TE, Routing(top_k=1)), None)
    assert ZLoss()(output, p_TE[0], 1.0).item() == near(1e-3 * math.log(4.0) ** 2)
    assert value_of(ZLoss(), TWO) == near(0.0)


def test_tsallis_entropy_of_order_two_and_its_extremes() -> None:
    """q = 2, p = (1/2, 1/4, 1/4): 1 - 3/8. Sure: 0. Uniform, q = 1.4, E = 4: (1 - 4^-.4) / .4."""
    assert value_of(TsallisEntropyLoss(1.0, 2.0), [[0.5, 0.25, 0.25]]) == near(0.625)
    assert value_of(TsallisEntropyLoss(), [[1.0, 0.0, 0.0]]) == near(0.0)
    assert value_of(TsallisEntropyLoss(), UNIFORM) == near(3 * 0.01 * (1 - 4**-0.4) / 0.4)
    assert value_of(TsallisEntropyLoss(), [[0.3, 0.2, 0.25, 0.25]]) < 0.01 * (1 - 4**-0.4) / 0.4


def test_tsallis_entropy_at_one_is_shannons() -> None:
    half = [[0.5, 0.25, 0.25]]
    assert value_of(TsallisEntropyLoss(1.0, 1.0), half) == near(1.5 * math.log(2))
    assert value_of(TsallisEntropyLoss(1.0, 1 + 1e-7), half) == pytest.approx(1.5 * math.log(2), rel=1e-6)


def test_mutual_information_is_least_for_sure_tokens_on_even_experts_and_nought_for_equal_ones() -> None:
    """TWO: mean (.4, .6), so -H(.4) + (H(.6) + H(.2)) / 2, times two tokens."""
    loss = MutualInformationLoss(weight=1.0, usage_from="micro_batch")
    assert value_of(loss, [[1.0, 0.0], [0.0, 1.0]]) == near(-2 * math.log(2))
    assert value_of(loss, [[0.7, 0.3], [0.7, 0.3]]) == near(0.0)

    def h(a: float) -> float:
        return -a * math.log(a) - (1 - a) * math.log(1 - a)

    assert value_of(loss, TWO) == near(-2 * h(0.4) + h(0.6) + h(0.2))


def test_mole_balance_is_minus_the_log_of_the_product() -> None:
    """Mean (.4, .6), product .24, times two tokens; uniform is least, alpha E ln E a token."""
    loss = MoleBalanceLoss(usage_from="micro_batch")
    assert value_of(loss, TWO) == near(-2 * 0.5 * math.log(0.24))
    assert value_of(loss, UNIFORM) == near(3 * 0.5 * 4 * math.log(4))
    assert value_of(loss, [[0.24, 0.26, 0.25, 0.25]]) > 0.5 * 4 * math.log(4)


def test_poisson_distinction_is_nought_at_its_target_in_any_order() -> None:
    """Rate 1, E = 2: 1 and 1/2, so q = (2/3, 1/3)."""
    loss = GmoePoissonLoss(weight=1.0, rate=1.0)
    assert value_of(loss, [[2 / 3, 1 / 3], [1 / 3, 2 / 3]]) == near(0.0)
    kl = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert value_of(loss, [[0.5, 0.5]]) == near(kl)
    code = GmoePoissonLoss(weight=1.0, rate=1.0, form="code")
    assert value_of(code, [[0.5, 0.5]]) == near(2 / 3 * math.log(4 / 3) - 1 / 3 * math.log(2 / 3))


def test_normal_balance_compares_the_sorted_load_with_a_sorted_bell() -> None:
    """E = 2, width 1: exp 0 and exp -1/2 at ranks 1, 2. K = 2: the load is the mean p, (.4, .6)."""
    bell = [1 / (1 + math.exp(-0.5)), math.exp(-0.5) / (1 + math.exp(-0.5))]
    kl = bell[0] * math.log(bell[0] / 0.6) + bell[1] * math.log(bell[1] / 0.4)
    loss = GmoeNormalLoss(weight=1.0, width=1.0, usage_from="micro_batch")
    assert value_of(loss, TWO) == near(2 * kl)
    assert value_of(loss, [bell]) == near(0.0) and value_of(loss, [bell[::-1]]) == near(0.0)
    assert value_of(GmoeNormalLoss(usage_from="micro_batch"), TWO) == near(8 * 2 * kl), "E / 2 = 1"


def test_normal_balance_takes_the_renormalised_weight_of_the_chosen() -> None:
    """K = 1: each token gives its first expert 1, so the load of TWO is (1/2, 1/2)."""
    loss = GmoeNormalLoss(weight=1.0, width=1e6, usage_from="micro_batch")
    assert value_of(loss, TWO, top_k=1) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("loss", "name", "start"),
    [
        (GmoePoissonLoss(weight=1.0), "gmoe_poisson_rate", 1.5),
        (GmoePoissonLoss(weight=1.0, form="code"), "gmoe_poisson_rate", 1.5),
        (GmoeNormalLoss(weight=1.0, usage_from="micro_batch"), "gmoe_normal_width", 2.0),
        (GmoeNormalLoss(weight=1.0, form="code", usage_from="micro_batch"), "gmoe_normal_width", 2.0),
    ],
)
def test_learned_parameters_start_at_the_fixed_ones_and_have_the_gradient_of_finite_differences(
    loss: Any, name: str, start: float
) -> None:
    assert loss.learned(4) == {name: start}
    p = [[0.4, 0.3, 0.2, 0.1], [0.05, 0.6, 0.15, 0.2]]

    def at(value: float) -> float:
        return value_of(loss, p, Extras(learned={name: torch.tensor(value, dtype=torch.float64)}), 4)

    assert at(start) == near(value_of(loss, p, top_k=4))
    parameter = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    found = loss(output_of(p, 4), torch.zeros(4), 1.0, Extras(learned={name: parameter}))
    (gradient,) = torch.autograd.grad(found, parameter)
    assert gradient.item() == pytest.approx((at(start + 1e-5) - at(start - 1e-5)) / 2e-5, rel=1e-6)
    if name == "gmoe_poisson_rate":
        assert at(3.0) == at(2.0) and at(0.5) == at(1.0)


def outputs(rows: list[list[float]]) -> Extras:
    return Extras(outputs_TKO=torch.tensor([rows], dtype=torch.float64))


def test_orthogonality_of_two_outputs_by_hand() -> None:
    """(1, 0) lies with (1/2, 1/2) along (1, 1), and (1, 1) with (1, 0) along (1, 0): 1/2 + 1."""
    slanted, upright = outputs([[1.0, 0.0], [1.0, 1.0]]), outputs([[0.0, 3.0], [2.0, 0.0]])
    paper, code = AeslOrthogonalityLoss(1.0, epsilon=0.0), AeslOrthogonalityLoss(1.0, "code", 0.0)
    assert value_of(paper, TWO[:1], slanted) == near(1.5)
    assert value_of(code, TWO[:1], slanted) == pytest.approx(0.75, rel=1e-9)
    for loss in (paper, code):
        assert value_of(loss, TWO[:1], upright) == pytest.approx(0.0, abs=1e-9)
        assert value_of(AeslOrthogonalityLoss(), TWO[:1], outputs([[0.0, 0.0]] * 2)) == 0.0


def test_orthogonality_of_the_code_is_the_least_squares_fit_by_the_others() -> None:
    rng = torch.Generator().manual_seed(0)
    o_KO = torch.randn(3, 6, generator=rng, dtype=torch.float64)
    expected = 0.0
    for j in range(3):
        others = torch.stack([o_KO[k] for k in range(3) if k != j], dim=1)
        fit = others @ torch.linalg.lstsq(others, o_KO[j][:, None]).solution
        expected += fit.square().sum().item() / 3
    loss = AeslOrthogonalityLoss(1.0, "code", 0.0)
    found = value_of(loss, [[0.5, 0.3, 0.2]], Extras(outputs_TKO=o_KO[None]), top_k=3)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_outputs_that_top_p_did_not_choose_are_left_out(form: Any) -> None:
    """Mass .7 takes the first two of three; top_p lists the third with weight 0."""
    p_TE = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    output = RouterOutput(p_TE.log(), p_TE, top_p(p_TE, Routing(mode="top_p", top_p=0.7)), None)
    o_TKO = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [1.0, -2.0]]], dtype=torch.float64, requires_grad=True)
    found = AeslOrthogonalityLoss(1.0, form)(output, p_TE[0], 1.0, Extras(outputs_TKO=o_TKO))
    found.backward()
    assert found.item() == pytest.approx(1.5 if form == "paper" else 1.5 / 2, rel=1e-4)
    assert o_TKO.grad is not None and o_TKO.grad[0, :2].any() and not o_TKO.grad[0, 2].any()


def test_variance_by_hand_over_tokens_and_over_experts() -> None:
    """Over tokens .04 + .04, times two tokens; over experts .01 in the first token and .09 in the second."""
    assert value_of(AeslVarianceLoss(1.0, usage_from="micro_batch"), TWO) == near(-0.16)
    assert value_of(AeslVarianceLoss(1.0, "experts"), TWO) == near(-0.1)
    assert value_of(AeslVarianceLoss(1.0, usage_from="micro_batch"), [[0.7, 0.3]] * 2) == near(0.0)
    assert value_of(AeslVarianceLoss(1.0, "experts"), UNIFORM) == near(0.0)


def test_a_supervised_gate_pays_for_its_label_and_nothing_without_one() -> None:
    """-ln .4 - ln .8 for the labels (1, 1); the first token alone for (1, none)."""
    loss = SupervisedGateLoss()
    assert value_of(loss, TWO, Extras(torch.tensor([1, 1]))) == near(-50 * math.log(0.32))
    assert value_of(loss, TWO, Extras(torch.tensor([1, -1]))) == near(-50 * math.log(0.4))
