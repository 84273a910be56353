"""The one look at a step's gradients, by the kernel and by torch, against float64."""

from __future__ import annotations

import pytest
import torch

from dsmixer.experts.host import has_host_library
from dsmixer.training import hold
from dsmixer.training.hold import IN_CACHE, hold_rows

BETA = (5e-5, 0.0, 0.3)
SHAPES = [(3, 1), (3, 15), (3, 16), (3, 1000), (3, 70_001), (3, IN_CACHE // 2 + 5)]


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that there are on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(hold, "can_multiply", lambda *dtypes: False)
    else:
        assert has_host_library()
    return str(request.param)


def _rows(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(shape[1])
    grad, weights = (torch.randn(shape, generator=rng) for _ in range(2))
    return grad, weights, weights + 1e-2 * torch.randn(shape, generator=rng), torch.tensor(BETA)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pull_norms_and_values_are_the_formulas(shape: tuple[int, int], way: str) -> None:
    """``g + 2 beta (w - o)``, its squared norm, and ``beta ||w - o||^2``, whatever the width."""
    grad, weights, origin, beta = _rows(shape)
    away = weights.double() - origin.double()
    whole = grad.double() + 2 * beta.double()[:, None] * away
    untouched = grad[1].clone()
    norms_N, values_N = hold_rows(grad, (weights, origin, beta))
    torch.testing.assert_close(grad.double(), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norms_N.double(), whole.square().sum(1), rtol=1e-5, atol=0)
    expected = beta.double() * away.square().sum(1)
    torch.testing.assert_close(values_N.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(grad[1], untouched) and values_N[1] == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_the_term_a_gradient_is_measured_and_left_as_it_is(shape: tuple[int, int], way: str) -> None:
    grad = _rows(shape)[0]
    before = grad.clone()
    norms_N, values_N = hold_rows(grad)
    torch.testing.assert_close(norms_N.double(), before.double().square().sum(1), rtol=1e-5, atol=0)
    assert torch.equal(grad, before) and not values_N.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 999])
def test_what_is_not_finite_shows_in_the_norm_of_its_row_alone(bad: float, place: int, way: str) -> None:
    for number in range(3):
        grad, weights, origin, beta = _rows((3, 1000))
        (grad, weights, origin)[number][0, place] = bad
        norms_N, values_N = hold_rows(grad, (weights, origin, beta))
        assert torch.isfinite(norms_N).tolist() == [False, True, True]
        assert torch.isfinite(values_N).tolist() == [number == 0, True, True]


def test_any_number_of_threads_gives_the_same_bit_for_bit() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            grad, *held = _rows((3, 70_001))
            found.append((*hold_rows(grad, tuple(held)), grad))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_what_the_kernel_does_not_know_goes_by_torch() -> None:
    """bfloat16, as a gradient may be."""
    grad, weights, origin, beta = _rows((3, 40))
    half = grad.bfloat16()
    whole = half.double() + 2 * beta.double()[:, None] * (weights - origin).double()
    norms_N, _ = hold_rows(half, (weights, origin, beta))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), whole, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(norms_N.double(), whole.square().sum(1), rtol=1e-2, atol=0)
