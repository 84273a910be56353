"""Pools of which a batch chooses few experts: the forms take those and no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank
from dsmixer.experts.blocked import blocked_pairs
from dsmixer.experts.forms import auto_form, forms
from dsmixer.experts.grouped import sorted_pairs
from dsmixer.experts.pairs import Pairs, Sorted, by_pairs, sort_pairs

E, R, D, O, T, K = 100, 8, 6, 4, 9, 3
"""E * R is above the limit of the dense form, the pairs are fewer than the experts."""

CHOICES = {
    "few": [3, 77],
    "one for all": [41],
    "first and last": [0, 99],
    "many": list(range(5, 95)),
    "nobody": [],
}


def leaves() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    shapes = {"x": (T, D), "a": (E, R, D), "b": (E, R, O), "weights": (T, K)}
    return {
        name: torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def pairs_of(among: list[int]) -> torch.Tensor:
    """Some pairs have no expert; with ``among`` empty none has one."""
    rng = torch.Generator().manual_seed(2)
    if not among:
        return torch.full((T, K), -1)
    indices_TK = torch.tensor(among)[torch.randint(len(among), (T, K), generator=rng)]
    return indices_TK.masked_fill(torch.rand(T, K, generator=rng) < 0.3, -1)


def by_loop(given: dict[str, torch.Tensor], indices_TK: torch.Tensor, s_E: torch.Tensor) -> torch.Tensor:
    """Pair by pair."""
    rows = [given["x"].new_zeros(O) + 0 * given["x"][t].sum() for t in range(T)]
    for t, k in [(t, k) for t in range(T) for k in range(K) if indices_TK[t, k] >= 0]:
        e = int(indices_TK[t, k])
        h_R = given["a"][e] @ given["x"][t]
        rows[t] = rows[t] + given["weights"][t, k] * s_E[e] * (given["b"][e].T @ h_R)
    return torch.stack(rows)


def gradients(y: torch.Tensor, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    found = torch.autograd.grad(y, list(given.values()), incoming, allow_unused=True)
    return tuple(
        torch.zeros_like(leaf) if grad is None else grad
        for grad, leaf in zip(found, given.values(), strict=True)
    )


@pytest.mark.parametrize("form", ["dense", "grouped", "blocked", "auto"])
@pytest.mark.parametrize("among", CHOICES.values(), ids=CHOICES.keys())
def test_the_chosen_experts_of_a_large_pool_speak_and_learn_as_in_a_loop(among: list[int], form: str) -> None:
    given, indices_TK, s_E = leaves(), pairs_of(among), torch.linspace(0.5, 2, E, dtype=torch.float64)
    assignment = Assignment(E, indices_TK=indices_TK, weights_TK=given["weights"])
    compute = auto_form if form == "auto" else forms[form]
    y = compute(given["x"], given["a"], given["b"], s_E, assignment)
    expected = by_loop(given, indices_TK, s_E)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    got, wanted = gradients(y, given), gradients(expected, given)
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
    idle = [e for e in range(E) if e not in among]
    assert not got[1][idle].any() and not got[2][idle].any()


@pytest.mark.parametrize("lay_out", [sorted_pairs, blocked_pairs])
@pytest.mark.parametrize("absent", [0, 7])
@pytest.mark.parametrize("among", CHOICES.values(), ids=CHOICES.keys())
def test_layouts_that_look_at_no_number_give_the_same(
    among: list[int], absent: int, lay_out: Callable[[Sorted], Pairs]
) -> None:
    """What a device does, where numbers are bounds: slots and blocks to spare change nothing."""
    given, indices_TK = leaves(), pairs_of(among)
    indices_TK.view(-1)[:absent] = -1
    expected = by_loop(given, indices_TK, torch.ones(E, dtype=torch.float64))

    def unseen(ordered: Sorted) -> Pairs:
        return lay_out(replace(ordered, seen=False))

    x_TD, a_ERD, b_ERO, weights_TK = given.values()
    assignment = Assignment(E, indices_TK=indices_TK, weights_TK=weights_TK)
    y = by_pairs(x_TD, a_ERD, b_ERO, torch.ones(E), assignment, layout=unseen)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for left, right in zip(gradients(y, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_pairs_are_counted_by_what_is_chosen_and_not_by_the_pool() -> None:
    indices_TK = torch.tensor([[5, 900], [-1, 5], [17, -1]])
    assignment = Assignment(1000, indices_TK=indices_TK, weights_TK=torch.ones(3, 2))
    assert assignment.chosen_C is not None and assignment.chosen_C.tolist() == [5, 17, 900]
    pairs = sorted_pairs(sort_pairs(indices_TK, 1000))
    assert pairs.chosen_C is not None and pairs.chosen_C.tolist() == [5, 17, 900]
    assert pairs.ends_C.tolist() == [2, 3, 4] and pairs.pair_I.tolist() == [0, 3, 4, 1]


def test_a_large_pool_s_bank_takes_the_wide_product_where_few_are_chosen() -> None:
    """The same numbers as the pool of the chosen alone, bit for bit."""
    torch.manual_seed(0)
    large = ExpertBank([str(e) for e in range(E)], D, O, ranks=[R] * E, alphas=[16.0] * E)
    small = ExpertBank(["3", "77"], D, O, ranks=[R] * 2, alphas=[16.0] * 2)
    with torch.no_grad():
        for bank in (large.lora_A, large.lora_B):
            bank.normal_()
        small.lora_A.copy_(large.lora_A[[3, 77]])
        small.lora_B.copy_(large.lora_B[[3, 77]])
    x_TD, indices_TK = torch.randn(T, D), pairs_of([0, 1])
    weights_TK = torch.rand(T, K)
    of_small = small(x_TD, Assignment(2, indices_TK=indices_TK, weights_TK=weights_TK))
    in_large = torch.where(indices_TK < 0, -1, torch.tensor([3, 77])[indices_TK.clamp_min(0)])
    of_large = large(x_TD, Assignment(E, indices_TK=in_large, weights_TK=weights_TK))
    assert torch.equal(of_large, of_small)
    of_small.square().sum().backward()
    of_large.square().sum().backward()
    for left, right in ((large.lora_A, small.lora_A), (large.lora_B, small.lora_B)):
        assert left.grad is not None and right.grad is not None
        assert torch.equal(left.grad[[3, 77]], right.grad)
