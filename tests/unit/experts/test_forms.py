"""The compute forms against one plain formula in float64, in outputs and every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.dropout import Dropout
from dsmixer.experts.forms import forms

FAST = ("dense", "grouped", "blocked", "pairs")
LEAVES = ("x", "a", "b", "weights")


@dataclass(frozen=True)
class Case:
    """T tokens, D and O wide, E experts of rank R; K of them a token, or a gate over all (K = 0)."""

    T: int
    D: int
    O: int
    E: int
    R: int
    K: int
    lonely: bool = False  # experts above 0 hear nothing
    absent: bool = False  # some pairs have no expert
    strided: bool = False  # inputs are not contiguous
    summed: bool = False  # the incoming gradient has stride 0
    dropout: float = 0.0
    seed: int = 0


def leaves_of(case: Case, dtype: torch.dtype = torch.float64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Leaves with gradients, and the indices ``[T, K]``."""
    rng = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> torch.Tensor:
        if case.strided:
            return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=rng, dtype=dtype).transpose(
                -1, -2
            )
        return torch.randn(*shape, generator=rng, dtype=dtype)

    num_weights = case.K or case.E
    leaves = {
        "x": draw(case.T, case.D),
        "a": draw(case.E, case.R, case.D),
        "b": draw(case.E, case.R, case.O),
        "weights": draw(case.T, num_weights),
    }
    highest = 1 if case.lonely else case.E
    indices_TK = torch.randint(-1 if case.absent else 0, highest, (case.T, num_weights), generator=rng)
    if not case.lonely and not case.absent:
        indices_TK = torch.rand(case.T, case.E, generator=rng).argsort(1)[:, :num_weights].contiguous()
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, indices_TK


def scaling_of(case: Case) -> torch.Tensor:
    return 0.5 + torch.arange(case.E, dtype=torch.float32) / 4


def dropout_of(case: Case) -> Dropout | None:
    return Dropout(case.dropout, seed=case.seed + 2) if case.dropout else None


def plain_formula(
    leaves: dict[str, torch.Tensor], indices_TK: torch.Tensor, s_E: torch.Tensor, case: Case
) -> torch.Tensor:
    """``sum_k w_tk s_e B_e A_e x_t`` in one einsum over gathered experts; of the package, dropout's mask."""
    x, a, b, weights = (leaves[name] for name in LEAVES)
    dropout = dropout_of(case)
    if dropout is not None:
        x = x * dropout.kept(x).to(x.dtype) / (1 - dropout.probability)
    if not case.K:
        return torch.einsum("te,e,erd,ero,td->to", weights, s_E.to(x.dtype), a, b, x)
    here = (indices_TK >= 0).to(x.dtype)
    safe = indices_TK.clamp_min(0)
    pair_weights = weights * here * s_E.to(x.dtype)[safe]
    return torch.einsum("tk,tkrd,tkro,td->to", pair_weights, a[safe], b[safe], x)


def run_form(
    name: str, leaves: dict[str, torch.Tensor], indices_TK: torch.Tensor, s_E: torch.Tensor, case: Case
) -> torch.Tensor:
    if case.K:
        assignment = Assignment(case.E, indices_TK=indices_TK, weights_TK=leaves["weights"])
    else:
        assignment = Assignment(case.E, gate_TE=leaves["weights"])
    return forms[name](leaves["x"], leaves["a"], leaves["b"], s_E, assignment, dropout_of(case))


def backward(y: torch.Tensor, leaves: dict[str, torch.Tensor], case: Case) -> tuple[torch.Tensor, ...]:
    if case.summed:
        return torch.autograd.grad(y.sum(), list(leaves.values()))
    rng = torch.Generator().manual_seed(case.seed + 1)
    incoming = torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, list(leaves.values()), incoming)


def assert_equals_formula(name: str, case: Case) -> None:
    leaves, indices_TK = leaves_of(case)
    s_E = scaling_of(case)
    expected = plain_formula(leaves, indices_TK, s_E, case)
    y = run_form(name, leaves, indices_TK, s_E, case)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-9)
    got, wanted = backward(y, leaves, case), backward(expected, leaves, case)
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-9)


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


@pytest.mark.parametrize("name", list(forms))
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_every_form_equals_the_formula_in_outputs_and_all_gradients(name: str, case: Case) -> None:
    assert_equals_formula(name, case)


@pytest.mark.parametrize("name", list(forms))
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


@pytest.mark.parametrize("name", list(forms))
def test_tokens_that_hear_no_expert_get_exactly_nothing(name: str) -> None:
    case = Case(T=4, D=8, O=8, E=3, R=8, K=2)
    leaves, indices_TK = leaves_of(case)
    indices_TK[1] = -1
    y = run_form(name, leaves, indices_TK, scaling_of(case), case)
    assert torch.equal(y[1], torch.zeros(8, dtype=y.dtype))
    weights_grad = backward(y, leaves, case)[3]
    assert torch.equal(weights_grad[1], torch.zeros(2, dtype=y.dtype))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("num_chosen", [0, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradcheck_by_finite_differences(name: str, num_chosen: int, dropout: float) -> None:
    case = Case(T=3, D=2, O=3, E=3, R=2, K=num_chosen, seed=3, dropout=dropout)
    leaves, indices_TK = leaves_of(case)

    def function(*values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(LEAVES, values, strict=True))
        return run_form(name, named, indices_TK, scaling_of(case), case)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [("a", "b"), ("x",), ("weights",), ("a",), ("b", "x")])
@pytest.mark.parametrize("name", FAST)
def test_what_needs_no_gradient_gets_none_and_changes_no_other(
    name: str, frozen: tuple[str, ...], dropout: float
) -> None:
    case = Case(T=6, D=8, O=8, E=3, R=8, K=2, dropout=dropout)
    leaves, indices_TK = leaves_of(case)
    everything = dict(
        zip(
            LEAVES,
            backward(run_form(name, leaves, indices_TK, scaling_of(case), case), leaves, case),
            strict=True,
        )
    )
    some = {k: v.detach().requires_grad_(k not in frozen) for k, v in leaves.items()}
    run_form(name, some, indices_TK, scaling_of(case), case).backward(
        torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )
    for leaf in LEAVES:
        if leaf in frozen:
            assert some[leaf].grad is None
        else:
            torch.testing.assert_close(some[leaf].grad, everything[leaf])


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
    rounded, indices_TK = leaves_of(case, torch.float32)
    leaves = {k: v.detach() for k, v in rounded.items()}
    leaves["x"] = leaves["x"].to(dtype)
    exact = {k: v.double().requires_grad_() for k, v in leaves.items()}
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    y = run_form(name, leaves, indices_TK, scaling_of(case), case)
    expected = plain_formula(exact, indices_TK, scaling_of(case), case)
    assert y.dtype == dtype
    pairs = [(y, expected)]
    pairs += zip(backward(y, leaves, case), backward(expected, exact, case), strict=True)
    for got, wanted in pairs:
        assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_chosen", [0, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", FAST)
def test_forward_keeps_the_input_the_pairs_and_the_weights_of_the_model_as_they_are(
    name: str, dropout: float, num_chosen: int, dtype: torch.dtype
) -> None:
    """Their own memory and no copy of it, so that projections share it and ZeRO-3 can release weights."""
    case = Case(T=64, D=16, O=24, E=6, R=16, K=num_chosen, dropout=dropout)
    leaves, indices_TK = leaves_of(case, torch.float32)
    leaves["x"] = leaves["x"].detach().to(dtype).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    s_E = scaling_of(case)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_form(name, leaves, indices_TK, s_E, case)
    for leaf in leaves.values():
        kept.pop(leaf.untyped_storage().data_ptr())
    if num_chosen:
        kept.pop(indices_TK.untyped_storage().data_ptr())
    # the scaling, and for the sorted form of a gate the numbers of the experts
    assert sum(kept.values()) <= (4 + 8) * case.E
