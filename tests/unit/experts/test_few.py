"""The form of a decoding step: what it computes, what it reads, and what it does not wait for."""

from __future__ import annotations

import pytest
import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank
from dsmixer.experts.few import MAX_PAIRS, suits_few
from dsmixer.experts.forms import auto_form, forms
from dsmixer.routing.context import RoutingContext
from dsmixer.routing.modes import Routing
from dsmixer.routing.requests import ROUTERS
from dsmixer.routing.router import Router

D, O, R = 24, 16, 8


def pool(num_experts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(num_experts)
    a_ERD = torch.randn(num_experts, R, D, generator=rng).to(dtype)
    b_ERO = torch.randn(num_experts, R, O, generator=rng).to(dtype)
    return a_ERD, b_ERO, 0.5 + torch.rand(num_experts, generator=rng)


def pairs(num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype = torch.float32) -> Assignment:
    rng = torch.Generator().manual_seed(num_tokens)
    indices_TK = torch.rand(num_tokens, num_experts, generator=rng).argsort(1)[:, :top_k]
    indices_TK[-1, -1] = -1
    weights_TK = torch.rand(num_tokens, top_k, generator=rng).to(dtype)
    return Assignment(num_experts, indices_TK=indices_TK, weights_TK=weights_TK)


@pytest.mark.parametrize(
    ("bank", "given", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.float64, 1e-12),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.float32, torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (1, 3), (2, 4), (8, 3), (16, 4)])
@torch.no_grad()
def test_without_gradients_it_equals_the_sum_written_out_in_float64(
    num_tokens: int, top_k: int, bank: torch.dtype, given: torch.dtype, tolerance: float
) -> None:
    a_ERD, b_ERO, s_E = pool(40, bank)
    x_TD = torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(9)).to(given)
    assignment = pairs(num_tokens, top_k, 40, torch.float64 if given == torch.float64 else torch.float32)
    assert assignment.indices_TK is not None and assignment.weights_TK is not None
    here_TK = (assignment.indices_TK >= 0) * assignment.weights_TK.double()
    chosen = assignment.indices_TK.clamp_min(0)
    expected = torch.einsum(
        "tk,tkrd,tkro,td->to",
        here_TK * s_E.double()[chosen],
        a_ERD.double()[chosen],
        b_ERO.double()[chosen],
        x_TD.double(),
    )
    for form in (forms["few"], auto_form):
        y_TO = form(x_TD, a_ERD, b_ERO, s_E, assignment, None)
        assert y_TO.dtype == given and y_TO.shape == (num_tokens, O)
        assert (y_TO.double() - expected).norm() <= tolerance * expected.norm().clamp_min(1e-9)


@pytest.mark.parametrize("num_tokens", [1, 8])
@torch.no_grad()
def test_experts_that_nobody_chose_are_not_read(num_tokens: int) -> None:
    a_ERD, b_ERO, s_E = pool(64, torch.float32)
    assignment = pairs(num_tokens, 3, 63)
    assignment = Assignment(64, indices_TK=assignment.indices_TK, weights_TK=assignment.weights_TK)
    assert assignment.indices_TK is not None
    named = torch.zeros(64, dtype=torch.bool)
    named[assignment.indices_TK.flatten().clamp_min(0)] = True
    a_ERD[~named] = b_ERO[~named] = float("nan")
    x_TD = torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(1))
    assert auto_form(x_TD, a_ERD, b_ERO, s_E, assignment, None).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [6, 64])
@torch.no_grad()
def test_a_rank_to_which_no_token_travels_gets_an_empty_sum(num_experts: int, dtype: torch.dtype) -> None:
    a_ERD, b_ERO, s_E = pool(num_experts, dtype)
    nothing = Assignment(
        num_experts, indices_TK=torch.zeros(0, 3, dtype=torch.int64), weights_TK=torch.zeros(0, 3)
    )
    for form in (forms["few"], auto_form):
        assert form(torch.zeros(0, D, dtype=dtype), a_ERD, b_ERO, s_E, nothing, None).shape == (0, O)


def test_training_and_long_inputs_keep_their_forms() -> None:
    x_TD = torch.zeros(1, D)
    assert not suits_few(x_TD, pairs(1, 3, 64), 64, small=False)  # gradients are on
    with torch.no_grad():
        assert suits_few(x_TD, pairs(1, 3, 64), 64, small=False)
        assert not suits_few(x_TD, pairs(MAX_PAIRS, 3, 64), 64, small=False)
        assert not suits_few(x_TD, Assignment(64, gate_TE=torch.ones(1, 64)), 64, small=False)


@pytest.mark.parametrize("num_experts", [6, 64])
@pytest.mark.parametrize("num_tokens", [1, 8])
@pytest.mark.parametrize("rows", [None, (2, ROUTERS, -1, ROUTERS)])
@torch.no_grad()
def test_a_decoding_step_on_a_device_depends_on_no_value(
    num_experts: int, num_tokens: int, rows: tuple[int, ...] | None
) -> None:
    """Tensors of the meta device have no values: whoever asks for one, or for a shape that follows from one,
    fails. So would the capture of a graph."""
    if rows is not None and num_tokens == 1:
        rows = (ROUTERS,)
    names = [f"e{e}" for e in range(num_experts)]
    bank = ExpertBank(names, D, O, ranks=[R] * num_experts, alphas=[8.0] * num_experts, device="meta")
    context = RoutingContext(num_experts, Routing(top_k=3, rows=rows))
    x_TD = torch.empty(num_tokens, D, device="meta")
    assignment = context.assign(Router(num_experts, D, "meta"), 0, x_TD, num_rows=num_tokens)
    assert bank(x_TD, assignment).shape == (num_tokens, O)
