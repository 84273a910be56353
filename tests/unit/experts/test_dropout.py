"""Dropout by a seed against what dropout is: shares, moments, independence, and one mask in both passes."""

from __future__ import annotations

import pytest
import torch

from dsmixer.experts.dropout import Dropout, drop

SHAPE = (1000, 401)  # no multiple of four numbers


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.99])
def test_the_share_that_is_dropped_and_the_mean_and_variance_are_those_of_dropout(probability: float) -> None:
    dropout = Dropout(probability, seed=7)
    x_TD = torch.ones(SHAPE, dtype=torch.float64)
    y_TD, num = drop(x_TD, dropout), x_TD.numel()
    # of ones: mean 1, variance p / (1 - p); five standard errors
    variance = probability / (1 - probability)
    assert (y_TD == 0).double().mean().item() == pytest.approx(
        probability, abs=5 * (probability * (1 - probability) / num) ** 0.5 + 2**-16
    )
    assert y_TD.mean().item() == pytest.approx(1.0, abs=5 * (variance / num) ** 0.5)
    assert y_TD.var().item() == pytest.approx(variance, rel=0.02)


def test_entries_are_dropped_independently_of_their_neighbours_and_of_other_seeds() -> None:
    """Correlations with the next entries and the next row, and between masks of seeds that follow another."""
    x_TD = torch.empty(SHAPE)
    kept = Dropout(0.3, seed=1).kept(x_TD).double() - 0.7
    others = [kept[:, shift:] * kept[:, :-shift] for shift in (1, 2, 3, 4, 8)] + [kept[1:] * kept[:-1]]
    others += [kept * (Dropout(0.3, seed).kept(x_TD).double() - 0.7) for seed in (0, 2, 2**40)]
    for product in others:
        assert abs(product.mean().item()) < 5 * 0.21 / product.numel() ** 0.5


def test_the_backward_pass_has_the_same_mask_and_the_seed_is_all_that_is_kept() -> None:
    dropout = Dropout(0.25, seed=3)
    x_TD = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = drop(x_TD, dropout)
    assert not kept
    torch.testing.assert_close(y_TD, x_TD * dropout.kept(x_TD) / 0.75)
    (gradient,) = torch.autograd.grad(y_TD, x_TD, torch.ones_like(y_TD))
    assert torch.equal(gradient == 0, y_TD == 0)
    assert torch.autograd.gradcheck(lambda x: drop(x, dropout), torch.randn(3, 4).double().requires_grad_())


def test_the_seed_is_of_the_cpu_generator_and_every_draw_is_another() -> None:
    torch.manual_seed(5)
    first, second = Dropout.draw(0.1), Dropout.draw(0.1)
    torch.manual_seed(5)
    assert Dropout.draw(0.1) == first != second
    # a mask leaves torch's own generators alone
    before = torch.get_rng_state()
    first.kept(torch.empty(8, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("probability", [0.0, 1 - 1e-9])
def test_a_share_near_none_or_all_stays_finite(probability: float) -> None:
    y_TD = drop(torch.ones(64, 64), Dropout(probability, seed=0))
    assert torch.isfinite(y_TD).all() and (probability > 0 or torch.equal(y_TD, torch.ones(64, 64)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_its_own_mask_twice_alike_and_waits_for_nothing() -> None:
    dropout, x_TD = Dropout(0.1, seed=3), torch.ones(SHAPE, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = [dropout.kept(x_TD) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*masks) and masks[0].is_cuda
    assert masks[0].float().mean().item() == pytest.approx(0.9, abs=0.003)
