"""The routing modes against examples worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmixer.routing.modes import Routing, hard_soft, modes, soft, top_p, topk

P_TE = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


def test_topk_renormalises_the_largest_two() -> None:
    choice = topk(P_TE, Routing(top_k=2))
    assert choice.indices_TK.tolist() == [[0, 1], [3, 2]]
    expected = torch.tensor([[0.5 / 0.8, 0.3 / 0.8], [0.4 / 0.7, 0.3 / 0.7]], dtype=torch.float64)
    torch.testing.assert_close(choice.weights_TK, expected)
    assert choice.gate_TE is None


def test_topk_without_renormalisation_keeps_p_and_shares_still_sum_to_one() -> None:
    choice = topk(P_TE, Routing(top_k=2, renormalize=False))
    assert choice.weights_TK.tolist() == [[0.5, 0.3], [0.4, 0.3]]
    torch.testing.assert_close(choice.shares_TK, topk(P_TE, Routing(top_k=2)).weights_TK)


def test_topk_with_fewer_experts_than_k_takes_all() -> None:
    assert topk(P_TE, Routing(top_k=9)).indices_TK.shape == (2, 4)


def test_topk_of_one_renormalised_gives_the_router_no_gradient() -> None:
    """Why K = 1 with renormalisation is refused for training."""
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    topk(torch.softmax(logits, 1), Routing(top_k=1)).weights_TK.sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-15


def test_soft_hears_every_expert_with_weight_p() -> None:
    choice = soft(P_TE, Routing(top_k=2))
    assert choice.gate_TE is not None and torch.equal(choice.gate_TE, P_TE)


def test_hard_soft_has_topks_forward_and_softs_gradient() -> None:
    logits = torch.log(P_TE).requires_grad_()
    values_TE = torch.tensor([[1.0, -2.0, 3.0, 5.0], [0.5, 0.1, -1.0, 2.0]], dtype=torch.float64)
    gate_TE = hard_soft(torch.softmax(logits, 1), Routing(top_k=2)).gate_TE
    assert gate_TE is not None
    expected = torch.zeros_like(P_TE)
    expected[0, :2] = torch.tensor([0.5, 0.3]) / 0.8
    expected[1, 2:] = torch.tensor([0.3, 0.4]) / 0.7
    torch.testing.assert_close(gate_TE, expected)
    assert not gate_TE[expected == 0].any()
    (got,) = torch.autograd.grad((gate_TE * values_TE).sum(), logits)
    # gradient of sum p_i v_i by hand: p_j (v_j - sum p v), also on the logits that were not chosen
    wanted = P_TE * (values_TE - (P_TE * values_TE).sum(1, keepdim=True))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("mass", "sizes"),
    [
        (0.05, (1, 1)),
        (0.5, (1, 2)),
        (0.51, (2, 2)),
        (0.8, (2, 3)),
        (0.89, (3, 3)),
        (0.96, (4, 4)),
        (1.0, (4, 4)),
    ],
)
def test_top_p_takes_the_fewest_that_reach_the_mass(mass: float, sizes: tuple[int, int]) -> None:
    gate_TE = top_p(P_TE, Routing(top_p=mass)).gate_TE
    assert gate_TE is not None
    assert ((gate_TE > 0).sum(1) == torch.tensor(sizes)).all()
    torch.testing.assert_close(gate_TE.sum(1), torch.ones(2, dtype=torch.float64))
    kept = gate_TE > 0
    torch.testing.assert_close(
        gate_TE[kept] / P_TE[kept], (1 / (P_TE * kept).sum(1, keepdim=True)).expand(2, 4)[kept]
    )


def test_top_p_without_renormalisation_keeps_p() -> None:
    gate_TE = top_p(P_TE, Routing(top_p=0.6, renormalize=False)).gate_TE
    assert gate_TE is not None
    expected = torch.tensor([[0.5, 0.3, 0.0, 0.0], [0.0, 0.0, 0.3, 0.4]], dtype=torch.float64)
    assert torch.equal(gate_TE, expected)


@settings(max_examples=50, deadline=None)
@given(
    num_tokens=st.integers(1, 5),
    num_experts=st.integers(1, 8),
    seed=st.integers(0, 999),
    mass=st.floats(0.01, 1.0),
)
def test_top_p_set_is_minimal(num_tokens: int, num_experts: int, seed: int, mass: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    p_TE = torch.softmax(2 * torch.randn(num_tokens, num_experts, generator=rng, dtype=torch.float64), 1)
    gate_TE = top_p(p_TE, Routing(top_p=mass)).gate_TE
    assert gate_TE is not None
    for p, gate in zip(p_TE, gate_TE, strict=True):
        kept = p[gate > 0]
        assert kept.sum() >= mass - 1e-9
        assert kept.sum() - kept.min() < mass + 1e-9
        assert not (gate == 0).any() or p[gate == 0].max() <= kept.min()


@pytest.mark.parametrize("mode", list(modes))
def test_weights_of_every_mode_sum_to_one_and_move_the_router(mode: str) -> None:
    logits = torch.randn(
        6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).requires_grad_()
    choice = modes[mode](torch.softmax(logits, 1), Routing(mode=mode, top_k=2))
    weights = choice.gate_TE if choice.gate_TE is not None else choice.weights_TK
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(weights.square().sum(), logits)
    assert gradient.any()


@pytest.mark.parametrize("mode", [mode for mode in modes if mode != "hard_soft"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_weights_have_the_gradient_of_finite_differences(mode: str, renormalize: bool) -> None:
    """``hard_soft``'s gradient is another by definition, and is held to soft's above."""
    routing = Routing(mode=mode, top_k=2, renormalize=renormalize, top_p=0.6)

    def weights(p_TE: torch.Tensor) -> torch.Tensor:
        choice = modes[mode](p_TE, routing)
        return choice.weights_TK if choice.gate_TE is None else choice.gate_TE

    assert torch.autograd.gradcheck(weights, P_TE.clone().requires_grad_())
