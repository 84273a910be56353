"""The auxiliary loss against a count by hand, and the registry that the trainer reads."""

from __future__ import annotations

import math

import pytest
import torch

from dsmixer.losses.balance import SwitchLoss, routing_losses
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.routing.modes import Routing, topk
from dsmixer.routing.statistics import RouterOutput


def output_of(logits_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> RouterOutput:
    p_TE = torch.softmax(logits_TE, dim=1)
    return RouterOutput(logits_TE, p_TE, topk(p_TE, Routing(top_k=2)), mask_T)


def test_switch_on_a_hand_computed_example() -> None:
    """Two tokens choose expert 0 and one expert 1: f = (2/3, 1/3, 0); the fourth token is padding."""
    p_TE = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.7, 0.1], [0.0001, 0.0001, 0.9998]])
    mask_T = torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss = SwitchLoss(alpha=0.01, usage_from="micro_batch")
    value = loss(output_of(p_TE.log(), mask_T), torch.full((3,), math.nan), 1.0)
    expected = 0.01 * 3 * (1.3 * 2 / 3 + 1.1 * 1 / 3)
    assert math.isclose(value.item(), expected, rel_tol=1e-5)


def test_switch_has_its_least_value_alpha_a_token_at_an_even_router() -> None:
    value = SwitchLoss(alpha=0.01)(output_of(torch.zeros(5, 4)), torch.full((4,), 0.25), 1.0)
    assert math.isclose(value.item(), 5 * 0.01, rel_tol=1e-6)


def test_switch_without_its_factor_is_rsl_without_entropy() -> None:
    """LoRA-Mixer's eq. 3 and the first term of its eq. 5 are one term."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    f_E = torch.tensor([0.4, 0.3, 0.2, 0.1])
    rsl = RoutingSpecializationLoss(alpha=0.1, entropy_weight=0.0)(output_of(logits), f_E, 0.7)
    switch = SwitchLoss(alpha=0.1 / 4)(output_of(logits), f_E, 0.7)
    torch.testing.assert_close(rsl, switch)


@pytest.mark.parametrize("name", list(routing_losses))
def test_every_loss_by_name_answers_a_sum_over_tokens_with_a_gradient(name: str) -> None:
    loss = routing_losses[name]()
    assert loss.usage in ("topk", "top1", "smooth") and loss.smooth_temperature > 0
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    f_E = torch.tensor([0.4, 0.3, 0.2, 0.1])
    whole = loss(output_of(logits), f_E, 1.0)
    halves = loss(output_of(logits[:2]), f_E, 1.0) + loss(output_of(logits[2:]), f_E, 1.0)
    torch.testing.assert_close(whole, halves)
    assert torch.autograd.grad(whole, logits)[0].any()
    assert loss(output_of(logits), f_E, 0.0).item() == 0.0
