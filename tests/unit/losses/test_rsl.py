"""RSL against closed forms worked out by hand, and against eq. 9 by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmixer.losses.rsl import RoutingSpecializationLoss, ramp_at
from dsmixer.losses.usage import micro_batch_usage
from dsmixer.routing.modes import Routing, modes
from dsmixer.routing.statistics import RouterOutput

SIGNS = {"specialize": 1.0, "paper_eq5": -1.0}


def output_of(
    logits_TE: torch.Tensor, mask_T: torch.Tensor | None = None, routing: Routing | None = None
) -> RouterOutput:
    routing = routing or Routing(top_k=2)
    p_TE = torch.softmax(logits_TE, dim=1)
    return RouterOutput(logits_TE, p_TE, modes[routing.mode](p_TE, routing), mask_T)


def draw_logits(
    num_tokens: int = 7, num_experts: int = 4, seed: int = 0, spread: float = 1.5
) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(num_tokens, num_experts, generator=rng, dtype=torch.float64)
    return logits.requires_grad_()


def gradient_by_hand(
    logits_TE: torch.Tensor, f_E: torch.Tensor, alpha: float, signed_lambda: float
) -> torch.Tensor:
    """dL/dz_j of ``alpha sum_i p_i f_i + sigma lambda H(p)``, one token at a time, in plain Python.

    With dp_i/dz_j = p_i (1[i = j] - p_j) the first term gives ``alpha p_j (f_j - sum_i p_i f_i)`` and the
    second ``-sigma lambda p_j (ln p_j + H)``.
    """
    rows = []
    for logits in logits_TE.tolist():
        total = sum(math.exp(z) for z in logits)
        p = [math.exp(z) / total for z in logits]
        mean_f = sum(pi * fi for pi, fi in zip(p, f_E.tolist(), strict=True))
        entropy = -sum(pi * math.log(pi) for pi in p)
        rows.append(
            [
                alpha * pj * (fj - mean_f) - signed_lambda * pj * (math.log(pj) + entropy)
                for pj, fj in zip(p, f_E.tolist(), strict=True)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def usage_by_hand(
    logits_TE: torch.Tensor, kind: str, top_k: int, tau: float, real: list[bool]
) -> torch.Tensor:
    """``f`` counted token by token."""
    num_experts = logits_TE.shape[1]
    sums = [0.0] * num_experts
    for logits, is_real in zip(logits_TE.tolist(), real, strict=True):
        if not is_real:
            continue
        temperature = tau if kind == "smooth" else 1.0
        exps = [math.exp(z / temperature) for z in logits]
        p = [value / sum(exps) for value in exps]
        ranking = sorted(range(num_experts), key=lambda i: -p[i])
        kept = {"smooth": ranking, "topk": ranking[:top_k], "top1": ranking[:1]}[kind]
        mass = sum(p[i] for i in kept)
        for i in kept:
            sums[i] += p[i] / mass
    return torch.tensor([value / sum(real) for value in sums], dtype=torch.float64)


@pytest.mark.parametrize("entropy", SIGNS)
@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 6),
    num_experts=st.integers(1, 6),
    spread=st.floats(0.0, 6.0),
    seed=st.integers(0, 9999),
)
def test_gradient_equals_the_closed_form_with_both_signs(
    entropy: str, num_tokens: int, num_experts: int, spread: float, seed: int
) -> None:
    logits = draw_logits(num_tokens, num_experts, seed, spread)
    f_E = torch.rand(num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = RoutingSpecializationLoss(alpha=0.3, entropy_weight=0.7, entropy=entropy)
    loss(output_of(logits), f_E, 0.5).backward()
    expected = 0.5 * gradient_by_hand(logits, f_E, 0.3, SIGNS[entropy] * 0.7)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)


def test_value_on_a_hand_computed_example() -> None:
    """p = (1/2, 1/4, 1/4): H = 1.5 ln 2, sum p f = 0.5 * 0.6 + 0.25 * 0.4 = 0.4."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64))
    f_E = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    for name, sign in SIGNS.items():
        loss = RoutingSpecializationLoss(alpha=0.1, entropy_weight=0.05, entropy=name)
        value = loss(output_of(logits), f_E, 1.0).item()
        assert math.isclose(value, 0.1 * 0.4 + sign * 0.05 * 1.5 * math.log(2), rel_tol=1e-12)


def test_penalising_the_entropy_sharpens_a_token_and_rewarding_it_flattens_one() -> None:
    """Which sign does what, by one step of descent: the question on which the paper contradicts itself."""
    for name, sharpens in (("specialize", True), ("paper_eq5", False)):
        logits = draw_logits(1, 4)
        before = output_of(logits).entropy_T().item()
        even = torch.full((4,), 0.25, dtype=torch.float64)
        RoutingSpecializationLoss(entropy=name)(output_of(logits), even, 1.0).backward()
        assert logits.grad is not None
        after = output_of(logits.detach() - logits.grad).entropy_T().item()
        assert (after < before) is sharpens


@pytest.mark.parametrize("usage", ["topk", "top1", "smooth"])
@pytest.mark.parametrize("entropy", SIGNS)
def test_micro_batch_usage_is_a_constant_to_the_gradient_as_in_eq_9(usage: str, entropy: str) -> None:
    """The literal form: f counted in the micro-batch, and detached; the mask takes two tokens out of all."""
    logits = draw_logits(9, 5, seed=3)
    real = [True, True, False, True, True, True, False, True, True]
    mask_T = torch.tensor(real, dtype=torch.float32)
    loss = RoutingSpecializationLoss(
        0.1, 0.05, entropy, usage=usage, usage_from="micro_batch", smooth_temperature=0.5
    )
    not_used = torch.full((5,), math.nan, dtype=torch.float64)
    loss(output_of(logits, mask_T), not_used, 1.0).backward()

    f_E = usage_by_hand(logits.detach(), usage, 2, 0.5, real)
    again = logits.detach().requires_grad_()
    p = torch.exp(again) / torch.exp(again).sum(1, keepdim=True)
    per_token = 0.1 * (p * f_E).sum(1) - SIGNS[entropy] * 0.05 * (p * p.log()).sum(1)
    per_token[mask_T.bool()].sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)
    assert logits.grad is not None and not logits.grad[~mask_T.bool()].any()


@pytest.mark.parametrize("usage", ["topk", "top1", "smooth"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_micro_batch_usage_equals_a_count_by_hand(usage: str, renormalize: bool) -> None:
    """The top-k usage is the mean renormalised weight, whether or not the mixture renormalises."""
    logits = draw_logits(11, 5, seed=5).detach()
    real = [i % 3 != 0 for i in range(11)]
    output = output_of(logits, torch.tensor(real).float(), Routing(top_k=3, renormalize=renormalize))
    expected = usage_by_hand(logits, usage, 3, 2.0, real)
    torch.testing.assert_close(micro_batch_usage(output, usage, 2.0), expected)
    assert math.isclose(expected.sum().item(), 1.0)


def test_previous_step_usage_makes_the_loss_linear_in_tokens() -> None:
    """Four micro-batches of one token give the gradient of one of four: accumulation changes nothing."""
    f_E = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    loss = RoutingSpecializationLoss()
    whole = draw_logits(4)
    loss(output_of(whole), f_E, 1.0).backward()
    parts = whole.detach().requires_grad_()
    for t in range(4):
        loss(output_of(parts[t : t + 1]), f_E, 1.0).backward()
    torch.testing.assert_close(whole.grad, parts.grad)


def test_an_all_padding_micro_batch_costs_nothing() -> None:
    for usage_from in ("previous_step", "micro_batch"):
        logits = draw_logits(3, 4)
        loss = RoutingSpecializationLoss(usage_from=usage_from)
        value = loss(output_of(logits, torch.zeros(3)), torch.full((4,), 0.25), 1.0)
        value.backward()
        assert value.item() == 0.0 and logits.grad is not None and not logits.grad.any()


def test_usage_of_a_half_precision_model_may_be_float32() -> None:
    logits = draw_logits(3, 4).detach().float().requires_grad_()
    value = RoutingSpecializationLoss()(output_of(logits), torch.full((4,), 0.25, dtype=torch.float64), 1.0)
    assert value.dtype == torch.float32


def test_ramp_rises_linearly_over_its_share_and_stays() -> None:
    assert [round(ramp_at(step, 10, 0.5), 9) for step in range(7)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]
    assert ramp_at(0, 10, 0.0) == 1.0
