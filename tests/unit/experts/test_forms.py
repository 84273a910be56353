"""The compute forms against one plain formula in float64, in outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.form_cases import LEAVES, Case, exact_of, gradients, leaves_of, plain_formula, run_form

from dsmixer.experts.forms import forms

EXACT = [name for name in forms if name != "fused"]
"""Those that take float64."""
FAST = ("dense", "grouped", "blocked", "pairs")


def assert_equals_formula(name: str, case: Case) -> None:
    leaves, indices_TK = leaves_of(case)
    expected = plain_formula(leaves, indices_TK, case)
    y = run_form(forms[name], leaves, indices_TK, case)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-9)
    got, wanted = gradients(y, leaves, case), gradients(expected, leaves, case)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-9)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 5))
    return Case(
        T=draw(st.integers(1, 9)),
        D=draw(st.sampled_from([1, 3, 8])),
        O=draw(st.sampled_from([1, 5, 8])),
        E=num_experts,
        R=draw(st.sampled_from([1, 6, 8, 64])),
        K=draw(st.integers(0, num_experts)),
        lonely=draw(st.booleans()),
        absent=draw(st.booleans()),
        strided=draw(st.booleans()),
        summed=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.25])),  # a share that sixteen bits hold exactly
        seed=draw(st.integers(0, 10_000)),
    )


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_every_form_equals_the_formula_in_outputs_and_all_gradients(name: str, case: Case) -> None:
    assert_equals_formula(name, case)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    "case",
    [
        Case(T=0, D=8, O=8, E=4, R=8, K=2),
        Case(T=0, D=8, O=8, E=4, R=8, K=0),
        Case(T=1, D=8, O=8, E=4, R=8, K=1),
        Case(T=7, D=8, O=8, E=4, R=8, K=2, lonely=True),
        Case(T=7, D=8, O=8, E=3, R=8, K=3, absent=True, summed=True),
        Case(T=5, D=3, O=5, E=3, R=6, K=3, strided=True, summed=True),
        Case(T=5, D=8, O=8, E=1, R=64, K=1, summed=True),
        Case(T=6, D=4, O=4, E=5, R=1, K=0, strided=True, summed=True),
        Case(T=7, D=8, O=8, E=3, R=8, K=3, absent=True, strided=True, summed=True, dropout=0.5),
    ],
    ids=[
        "no token",
        "no token, full gate",
        "one token",
        "experts without tokens",
        "absent pairs",
        "strided",
        "one expert",
        "gate",
        "dropout",
    ],
)
def test_shapes_that_break_kernels(name: str, case: Case) -> None:
    assert_equals_formula(name, case)


@pytest.mark.parametrize("name", EXACT)
def test_tokens_that_hear_no_expert_get_exactly_nothing(name: str) -> None:
    case = Case(T=4, D=8, O=8, E=3, R=8, K=2)
    leaves, indices_TK = leaves_of(case)
    indices_TK[1] = -1
    y = run_form(forms[name], leaves, indices_TK, case)
    assert torch.equal(y[1], torch.zeros(8, dtype=y.dtype))
    weights_grad = gradients(y, leaves, case)["weights"]
    assert torch.equal(weights_grad[1], torch.zeros(2, dtype=y.dtype))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("num_chosen", [0, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradcheck_by_finite_differences(name: str, num_chosen: int, dropout: float) -> None:
    case = Case(T=3, D=2, O=3, E=3, R=2, K=num_chosen, seed=3, dropout=dropout)
    leaves, indices_TK = leaves_of(case)

    def function(*values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(LEAVES, values, strict=True))
        return run_form(forms[name], named, indices_TK, case)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [("a", "b"), ("x",), ("weights",), ("a",), ("b", "x")])
@pytest.mark.parametrize("name", FAST)
def test_what_needs_no_gradient_gets_none_and_changes_no_other(
    name: str, frozen: tuple[str, ...], dropout: float
) -> None:
    case = Case(T=6, D=8, O=8, E=3, R=8, K=2, dropout=dropout)
    leaves, indices_TK = leaves_of(case)
    everything = gradients(run_form(forms[name], leaves, indices_TK, case), leaves, case)
    some = {k: v.detach().requires_grad_(k not in frozen) for k, v in leaves.items()}
    got = gradients(run_form(forms[name], some, indices_TK, case), some, case)
    assert got.keys() == set(LEAVES) - set(frozen)
    torch.testing.assert_close(got, {leaf: everything[leaf] for leaf in got})


@pytest.mark.parametrize("name", list(forms))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=33, D=32, O=16, E=4, R=8, K=2, summed=True),
        Case(T=33, D=32, O=16, E=4, R=8, K=0),
        Case(T=9, D=32, O=16, E=4, R=8, K=2, lonely=True, absent=True),
        Case(T=9, D=10, O=6, E=4, R=8, K=2, strided=True),
        Case(T=33, D=32, O=16, E=4, R=8, K=2, dropout=0.25),
    ],
    ids=["sum", "gate", "lonely", "unaligned", "dropout"],
)
def test_low_precision_input_with_float32_weights_stays_near_float64(
    name: str, dtype: torch.dtype, tolerance: float, case: Case
) -> None:
    case = replace(case, dtype=dtype, bank_dtype=torch.float32)
    leaves, indices_TK = leaves_of(case)
    exact = exact_of(leaves)
    y, expected = run_form(forms[name], leaves, indices_TK, case), plain_formula(exact, indices_TK, case)
    assert y.dtype == dtype
    got, wanted = gradients(y, leaves, case), gradients(expected, exact, case)
    assert (y.double() - expected).norm() <= tolerance * expected.norm()
    for leaf in LEAVES:
        assert (got[leaf].double() - wanted[leaf]).norm() <= tolerance * wanted[leaf].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_chosen", [0, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", FAST)
def test_forward_keeps_the_input_the_pairs_and_the_weights_of_the_model_as_they_are(
    name: str, dropout: float, num_chosen: int, dtype: torch.dtype
) -> None:
    """Their own memory and no copy of it, so that projections share it and ZeRO-3 can release weights."""
    sizes = {"T": 64, "D": 16, "O": 24, "E": 6, "R": 16, "K": num_chosen}
    case = Case(**sizes, dropout=dropout, dtype=dtype, bank_dtype=torch.float32)
    leaves, indices_TK = leaves_of(case)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_form(forms[name], leaves, indices_TK, case)
    for leaf in leaves.values():
        kept.pop(leaf.untyped_storage().data_ptr())
    if num_chosen:
        kept.pop(indices_TK.untyped_storage().data_ptr())
    # the scaling, and for the sorted form of a gate the numbers of the experts
    assert sum(kept.values()) <= (4 + 8) * case.E
