"""The margin keeps experts that join out of the choice of tokens that are not theirs."""

from __future__ import annotations

import pytest
import torch

from dsmixer.losses.interface import Extras
from dsmixer.losses.supervised_margin import SupervisedMarginLoss
from dsmixer.routing.modes import Routing, topk
from dsmixer.routing.statistics import RouterOutput

LOSS = SupervisedMarginLoss(weight=1.0, margin=1.0, own=2.0)


def output_of(logits_TE: torch.Tensor, top_k: int = 2) -> RouterOutput:
    p_TE = logits_TE.softmax(1)
    routing = Routing(top_k=min(top_k, logits_TE.shape[1]))
    return RouterOutput(logits_TE, p_TE, topk(p_TE, routing), None)


def cost(logits: list[float], label: int, trained: list[int], top_k: int = 2) -> float:
    """Of one token."""
    trained_E = torch.zeros(len(logits), dtype=torch.bool)
    trained_E[trained] = True
    extras = Extras(labels_T=torch.tensor([label]), trained_E=trained_E)
    output = output_of(torch.tensor([logits], dtype=torch.float64), top_k)
    return LOSS(output, torch.zeros(len(logits)), 1.0, extras).item()


def test_its_cost_by_hand_on_and_off_the_own_domain() -> None:
    """The last row trains, K = 2. Elsewhere its bar is the second of the others, 2; at home the first, 3."""
    assert cost([3.0, 2.0, 0.0, 2.5], label=0, trained=[3]) == pytest.approx(1 + 2.5 - 2)
    assert cost([3.0, 2.0, 0.0, 1.0], label=0, trained=[3]) == 0.0
    assert cost([3.0, 2.0, 0.0, 2.5], label=3, trained=[3]) == pytest.approx(2 * (1 + 3 - 2.5))
    assert cost([3.0, 2.0, 0.0, 4.0], label=3, trained=[3]) == 0.0
    assert cost([3.0, 2.0, 0.0, 2.5], label=-1, trained=[3]) == 0.0


def test_each_of_several_newcomers_stays_below_those_that_were_there() -> None:
    """Rows 2 and 3 train; the bar is the least of the two others, 2, whatever the other newcomer has."""
    assert cost([3.0, 2.0, 9.0, 1.5], label=0, trained=[2, 3]) == pytest.approx((1 + 9 - 2) + (1 + 1.5 - 2))
    assert cost([3.0, 2.0, 9.0, 1.5], label=2, trained=[2, 3]) == pytest.approx(1 + 1.5 - 2)


def test_fewer_others_than_k_make_the_least_of_them_the_bar() -> None:
    assert cost([3.0, 2.5], label=0, trained=[1], top_k=2) == pytest.approx(1 + 2.5 - 3)


def test_a_token_that_costs_nothing_is_routed_as_if_the_newcomer_were_not_there() -> None:
    """Choice and weights are those of a softmax and top-k over the other columns alone."""
    rng = torch.Generator().manual_seed(0)
    logits_TE = 2 * torch.randn(400, 6, generator=rng, dtype=torch.float64)
    trained_E = torch.tensor([False] * 5 + [True])
    free = []
    for row in logits_TE:
        extras = Extras(labels_T=torch.tensor([0]), trained_E=trained_E)
        free.append(LOSS(output_of(row[None], 3), trained_E, 1.0, extras).item() == 0.0)
    kept_TE = logits_TE[torch.tensor(free)]
    assert 50 < len(kept_TE) < 350
    grown, before = output_of(kept_TE, 3).choice, output_of(kept_TE[:, :5], 3).choice
    assert torch.equal(grown.indices_TK, before.indices_TK)
    torch.testing.assert_close(grown.weights_TK, before.weights_TK, rtol=1e-12, atol=0)


def test_descent_admits_a_newcomer_at_home_and_keeps_it_out_elsewhere() -> None:
    """Two kinds of inputs at a right angle; three experts are fixed, and the fourth starts as their mean."""
    rng = torch.Generator().manual_seed(0)
    x_TD = torch.randn(200, 8, generator=rng)
    home_T = torch.arange(200) % 5 == 0
    x_TD[:, 0] = torch.where(home_T, 3.0, 0.0)
    x_TD[:, 1] = torch.where(home_T, 0.0, 3.0)
    fixed_ED = torch.randn(3, 8, generator=rng)
    row_D = fixed_ED.mean(0).requires_grad_()
    optimizer = torch.optim.Adam([row_D], lr=0.05)
    extras = Extras(labels_T=torch.where(home_T, 3, 0), trained_E=torch.tensor([False, False, False, True]))
    for _ in range(300):
        output = output_of(x_TD @ torch.cat((fixed_ED, row_D[None])).T)
        optimizer.zero_grad()
        LOSS(output, fixed_ED.new_zeros(4), 1 / 200, extras).backward()
        optimizer.step()
    chosen_T = (output.choice.indices_TK == 3).any(1)
    assert chosen_T[home_T].float().mean() > 0.95 and chosen_T[~home_T].float().mean() < 0.05
