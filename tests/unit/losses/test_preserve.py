"""The preserve term's gradient, which never passes through autograd, against autograd."""

from __future__ import annotations

import torch

from dsmixer.losses.preserve import add_preserve


def test_gradient_and_value_equal_autograds() -> None:
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    origin = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    beta_rows = torch.tensor([[5e-5], [0.0], [0.3], [5e-5]], dtype=torch.float64)
    expected = sum(beta_rows[i, 0] * (weights[i] - origin[i]).norm() ** 2 for i in range(4))
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    before = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    gradient = before.clone()
    value = add_preserve(gradient, weights.detach(), origin, beta_rows)
    torch.testing.assert_close(value.sum(), expected.detach())
    torch.testing.assert_close(gradient, before + weights.grad)
    assert gradient[1].equal(before[1])


def test_an_expert_at_its_origin_feels_nothing() -> None:
    origin = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    gradient = torch.zeros(3, 5)
    value = add_preserve(gradient, origin.clone(), origin, torch.full((3, 1), 5e-5))
    assert not gradient.any() and not value.any()
