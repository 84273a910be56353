"""The routers' statistics against counts made token by token in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.routing.modes import Routing, modes
from dsmixer.routing.router import Router
from dsmixer.routing.statistics import MAX_DOMAIN_CELLS, RouterOutput, RoutingStatistics


def output_of(logits_TE: torch.Tensor, routing: Routing, mask_T: torch.Tensor | None = None) -> RouterOutput:
    p_TE = torch.softmax(logits_TE, dim=1)
    return RouterOutput(logits_TE, p_TE, modes[routing.mode](p_TE, routing), mask_T)


def draw_logits(num_tokens: int = 8, num_experts: int = 4) -> torch.Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(1))


def test_sums_over_real_tokens_equal_a_count_by_hand() -> None:
    logits = draw_logits()
    real = [True, True, False, True, True, False, True, True]
    domains = torch.tensor([0, 1, -1, 1, 0, -1, 2, 2])
    statistics = RoutingStatistics(2, 4, num_domains=3, smooth_temperature=0.5)
    statistics.record(1, output_of(logits, Routing(top_k=2), torch.tensor(real).float()), domains)

    p_sum, squares, weights, first, chosen, smooth = ([0.0] * 4 for _ in range(6))
    entropy = 0.0
    by_domain = [[0.0] * 4 for _ in range(3)]
    for t, row in enumerate(logits.tolist()):
        if not real[t]:
            continue
        p = [math.exp(z) / sum(map(math.exp, row)) for z in row]
        tempered = [math.exp(2 * z) / sum(math.exp(2 * y) for y in row) for z in row]
        ranking = sorted(range(4), key=lambda i: -p[i])
        for i in range(4):
            p_sum[i] += p[i]
            squares[i] += p[i] ** 2
            smooth[i] += tempered[i]
            entropy -= p[i] * math.log(p[i])
        for i in ranking[:2]:
            weights[i] += p[i] / (p[ranking[0]] + p[ranking[1]])
            chosen[i] += 1
        first[ranking[0]] += 1
        by_domain[int(domains[t])][ranking[0]] += 1

    for got, wanted in (
        (statistics.p_ME, p_sum),
        (statistics.p_squared_ME, squares),
        (statistics.weight_ME, weights),
        (statistics.top1_ME, first),
        (statistics.chosen_ME, chosen),
        (statistics.smooth_ME, smooth),
    ):
        torch.testing.assert_close(got[1], torch.tensor(wanted))
        assert not got[0].any()
    assert math.isclose(statistics.entropy_M[1].item(), entropy, rel_tol=1e-5)
    assert statistics.tokens_M.tolist() == [0.0, 6.0]
    assert statistics.domain_MGE[1].tolist() == by_domain


def test_micro_batches_add_up_to_the_whole() -> None:
    logits = draw_logits(9)
    whole, parts = RoutingStatistics(1, 4), RoutingStatistics(1, 4)
    whole.record(0, output_of(logits, Routing(top_k=3)), None)
    for piece in logits.split(2):
        parts.record(0, output_of(piece, Routing(top_k=3)), None)
    torch.testing.assert_close(whole.buffer, parts.buffer)


@pytest.mark.parametrize("renormalize", [True, False])
def test_topk_usage_is_the_mean_renormalised_weight(renormalize: bool) -> None:
    """Also where the mixture does not renormalise: a sure token counts no more than an unsure one."""
    p_TE = torch.tensor([[0.9, 0.1, 0.0 + 1e-9], [0.2, 0.45, 0.35]])
    statistics = RoutingStatistics(1, 3)
    statistics.record(0, output_of(p_TE.log(), Routing(top_k=2, renormalize=renormalize)), None)
    expected = torch.tensor([0.9 / 2, (0.1 + 0.45 / 0.8) / 2, 0.35 / 0.8 / 2])
    torch.testing.assert_close(statistics.usage("topk")[0], expected, rtol=1e-4, atol=1e-6)


def test_every_usage_sums_to_one_and_a_router_without_tokens_is_even() -> None:
    statistics = RoutingStatistics(2, 4, smooth_temperature=1.0)
    statistics.record(0, output_of(draw_logits(), Routing(top_k=2)), None)
    for kind in ("topk", "top1", "smooth"):
        usage_ME = statistics.usage(kind)
        torch.testing.assert_close(usage_ME.sum(1), torch.ones(2))
        assert usage_ME[1].tolist() == [0.25] * 4


@pytest.mark.parametrize(("mode", "num_chosen"), [("topk", 2), ("hard_soft", 2), ("soft", 4)])
def test_chosen_counts_the_experts_that_a_token_hears(mode: str, num_chosen: int) -> None:
    statistics = RoutingStatistics(1, 4)
    statistics.record(0, output_of(draw_logits(), Routing(mode=mode, top_k=2)), None)
    assert statistics.chosen_ME.sum().item() == 8 * num_chosen


def test_domains_are_counted_apart_only_while_there_are_few() -> None:
    few = RoutingStatistics(1, 8, num_domains=MAX_DOMAIN_CELLS // 8)
    many = RoutingStatistics(1, 8, num_domains=MAX_DOMAIN_CELLS // 8 + 1)
    assert few.domain_MGE.shape == (1, MAX_DOMAIN_CELLS // 8, 8)
    assert many.domain_MGE.shape == (1, 0, 8)
    many.record(0, output_of(draw_logits(5, 8), Routing()), torch.zeros(5, dtype=torch.long))
    assert many.tokens_M.item() == 5


def test_statistics_leave_no_graph() -> None:
    logits = draw_logits().requires_grad_()
    statistics = RoutingStatistics(1, 4)
    statistics.record(0, output_of(logits, Routing()), None)
    assert not statistics.buffer.requires_grad


def test_router_answers_in_float32_whatever_it_reads() -> None:
    router = Router(3, 8)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(5, 8)
    assert router(x.bfloat16()).dtype == torch.float32
    assert router(x.double()).dtype == torch.float64
    torch.testing.assert_close(router(x.double()), x.double() @ router.weight.double().T)


@pytest.mark.parametrize("wide", [1.0, 30.0, 400.0])
def test_entropy_and_its_gradient_stay_exact_where_probabilities_vanish(wide: float) -> None:
    """Against log-softmax in float64; at 400 most probabilities are zero in float32."""
    logits_TE = wide * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    found, exact = logits_TE.clone().requires_grad_(), logits_TE.double().requires_grad_()
    entropy_T = output_of(found, Routing(top_k=2)).entropy_T()
    expected_T = -(exact.softmax(1) * exact.log_softmax(1)).sum(1)
    torch.testing.assert_close(entropy_T.double(), expected_T, rtol=1e-5, atol=1e-6)
    entropy_T.sum().backward()
    expected_T.sum().backward()
    assert found.grad is not None and exact.grad is not None
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


class _Passes(TorchDispatchMode):
    """Counts the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_and_the_statistics_share_their_passes_and_nothing_of_them_changes(masked: bool) -> None:
    logits, usage_E = draw_logits(8, 4), torch.tensor([0.4, 0.3, 0.2, 0.1])
    mask_T = torch.arange(8) < 6 if masked else None
    loss_of = RoutingSpecializationLoss()
    expected = loss_of(output_of(logits.requires_grad_(), Routing(), mask_T), usage_E, 1.0)
    (gradient,) = torch.autograd.grad(expected, logits)
    statistics = RoutingStatistics(1, 4)
    statistics.record(0, output_of(logits, Routing(), mask_T), None)
    for first in ("loss", "statistics"):
        output, found = output_of(logits, Routing(), mask_T), RoutingStatistics(1, 4)
        with _Passes() as passes:
            if first == "statistics":
                found.record(0, output, None)
            loss = loss_of(output, usage_E, 1.0)
            if first == "loss":
                found.record(0, output, None)
        assert torch.equal(loss, expected) and torch.equal(found.buffer, statistics.buffer)
        assert torch.equal(torch.autograd.grad(loss, logits)[0], gradient)
        assert passes.counts["aten.special_entr.default"] == (1 if first == "loss" else 2)
