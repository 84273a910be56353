"""The balance losses against counts by hand, and what their minimum is."""

from __future__ import annotations

import math

import pytest
import torch

from dsmixer.losses.auxiliary import AuxiliaryLoss, MixLoraLoss, QuadraticLoss
from dsmixer.losses.balance import SwitchLoss
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.routing.modes import Routing, topk
from dsmixer.routing.statistics import RouterOutput


def output_of(logits_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> RouterOutput:
    p_TE = torch.softmax(logits_TE, dim=1)
    return RouterOutput(logits_TE, p_TE, topk(p_TE, Routing(top_k=2)), mask_T)


def hand_drawn() -> RouterOutput:
    """Two tokens choose expert 0 first and one expert 1; the fourth token is padding."""
    rows = [[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.7, 0.1], [0.0001, 0.0001, 0.9998]]
    p_TE = torch.tensor(rows, dtype=torch.float64)
    return output_of(p_TE.log(), torch.tensor([1.0, 1.0, 1.0, 0.0]))


NOWHERE = torch.full((3,), math.nan, dtype=torch.float64)


def test_switch_on_a_hand_computed_example() -> None:
    """f = (2/3, 1/3, 0) and sums of p (1.3, 1.1, .6)."""
    value = SwitchLoss(alpha=0.01, usage_from="micro_batch")(hand_drawn(), NOWHERE, 1.0)
    expected = 0.01 * 3 * (1.3 * 2 / 3 + 1.1 * 1 / 3)
    assert math.isclose(value.item(), expected, rel_tol=1e-12)


def test_the_papers_auxiliary_loss_is_switch_without_the_number_of_experts() -> None:
    value = AuxiliaryLoss(usage_from="micro_batch")(hand_drawn(), NOWHERE, 1.0)
    assert math.isclose(value.item(), 0.1 * (1.3 * 2 / 3 + 1.1 * 1 / 3), rel_tol=1e-12)


def test_mixlora_counts_every_choice() -> None:
    """Pairs (0, 1), (0, 2), (1, 0): f = (3, 2, 1) / 3, whose sum is K = 2."""
    value = MixLoraLoss(usage_from="micro_batch")(hand_drawn(), NOWHERE, 1.0)
    expected = 0.01 * 3 * (1.3 * 3 / 3 + 1.1 * 2 / 3 + 0.6 * 1 / 3)
    assert math.isclose(value.item(), expected, rel_tol=1e-12)


def test_quadratic_on_a_hand_computed_example() -> None:
    """Mean p = (1.3, 1.1, .6) / 3: sum of squares 3.26 / 9, times three tokens."""
    value = QuadraticLoss(usage_from="micro_batch")(hand_drawn(), NOWHERE, 1.0)
    assert math.isclose(value.item(), 0.1 * 3 * 3.26 / 9, rel_tol=1e-12)


def test_switch_has_its_least_value_alpha_a_token_at_an_even_router() -> None:
    value = SwitchLoss(alpha=0.01)(output_of(torch.zeros(5, 4)), torch.full((4,), 0.25), 1.0)
    assert math.isclose(value.item(), 5 * 0.01, rel_tol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_only_minimiser_of_the_quadratic_form_is_uniform_as_in_eq_23(seed: int) -> None:
    """Every other mean costs more than alpha / E, and descent from it ends there."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, 5, generator=rng, dtype=torch.float64)
    before, m_E = math.inf, torch.full((5,), 0.2, dtype=torch.float64)
    for _ in range(4000):
        logits.requires_grad_()
        output = output_of(logits)
        exact = QuadraticLoss(alpha=1.0, usage_from="micro_batch")(output, m_E, 1.0).item()
        assert 0.2 - 1e-12 <= exact <= before + 1e-12
        (gradient,) = torch.autograd.grad(
            QuadraticLoss(alpha=1.0)(output, output.p_TE[0].detach(), 1.0), logits
        )
        logits, before = (logits - gradient).detach(), exact
    torch.testing.assert_close(output_of(logits).p_TE, m_E[None], rtol=0, atol=1e-6)


def test_quadratic_differs_from_the_auxiliary_loss_by_the_gradient_of_its_second_factor() -> None:
    """With f = p as a constant, eq. 3 has half of eq. 21's gradient."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    m_E = torch.softmax(logits, 1).mean(0).detach()
    gradients = [
        torch.autograd.grad(loss(output_of(logits), m_E, 1.0), logits)[0]
        for loss in (QuadraticLoss(), AuxiliaryLoss(usage="mean_p"))
    ]
    torch.testing.assert_close(gradients[0], 2 * gradients[1])


def test_switch_without_its_factor_is_rsl_without_entropy() -> None:
    """LoRA-Mixer's eq. 3 and the first term of its eq. 5 are one term."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    f_E = torch.tensor([0.4, 0.3, 0.2, 0.1])
    rsl = RoutingSpecializationLoss(alpha=0.1, entropy_weight=0.0)(output_of(logits), f_E, 0.7)
    torch.testing.assert_close(rsl, SwitchLoss(alpha=0.1 / 4)(output_of(logits), f_E, 0.7))
    torch.testing.assert_close(rsl, AuxiliaryLoss()(output_of(logits), f_E, 0.7))
