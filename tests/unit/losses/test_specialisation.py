"""What each routing loss makes of a router: the sign of the entropy term decides, and it is ours."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.routing.modes import Routing, soft
from dsmixer.routing.statistics import RouterOutput

TOP = math.log(6)


@functools.cache
def stream_bench() -> Any:
    path = Path(__file__).parents[2] / "bench" / "rsl_stream.py"
    spec = importlib.util.spec_from_file_location("rsl_stream", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rsl_stream"] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def outcome(name: str, **options: float) -> Any:
    bench = stream_bench()
    return bench.train_router(bench.LOSSES[name](6), steps=500, **options)


def test_specialize_ends_with_low_token_entropy_and_balanced_load() -> None:
    start, end = outcome("none (the start)"), outcome("specialize")
    assert end.entropy < 0.05 * TOP < 0.9 * TOP < start.entropy
    assert end.purity > 0.99
    assert end.load_variance < 0.1
    # what the balance term is for: the entropy term by itself leaves the load uneven
    assert end.load_variance < 0.5 * outcome("entropy alone").load_variance


@pytest.mark.parametrize("logit_std", [0.1, 1.0])
def test_the_plain_auxiliary_loss_balances_without_collapse_or_specialisation(logit_std: float) -> None:
    start = outcome("none (the start)", logit_std=logit_std)
    end = outcome("switch", logit_std=logit_std)
    assert end.load_variance < 0.5 * start.load_variance
    assert end.largest_load < 1.5 / 6
    assert abs(end.entropy - start.entropy) < 0.1 * TOP


@pytest.mark.parametrize("logit_std", [0.1, 1.0])
def test_paper_eq5_ends_near_uniform(logit_std: float) -> None:
    end = outcome("paper_eq5", logit_std=logit_std)
    assert end.entropy > 0.999 * TOP
    assert end.largest_mean_p < 1.1 / 6


def test_a_common_direction_collapses_the_entropy_term_alone_and_a_smaller_lambda_keeps_the_balance() -> None:
    collapsed = outcome("entropy alone", common=1.0)
    assert collapsed.largest_load > 0.9
    end = outcome("specialize, lambda .01", common=1.0)
    assert end.entropy < 0.05 * TOP and end.largest_load < 1.6 / 6


@pytest.mark.parametrize(("entropy_weight", "restores"), [(0.9 * 0.1 / 6, True), (1.1 * 0.1 / 6, False)])
def test_even_load_is_stable_against_a_common_shift_while_lambda_is_below_alpha_over_E(
    entropy_weight: float, restores: bool
) -> None:
    """Near p = 1/E a shift d of all tokens' p meets ``(alpha/E - lambda) d``: closed form, smooth f = p."""
    shift_E = torch.tensor([1e-3, -1e-3, 0, 0, 0, 0], dtype=torch.float64)
    logits = shift_E.repeat(8, 1).requires_grad_()
    p_TE = torch.softmax(logits, dim=1)
    loss = RoutingSpecializationLoss(0.1, entropy_weight, usage="smooth", usage_from="micro_batch")
    output = RouterOutput(logits, p_TE, soft(p_TE, Routing()), None)
    loss(output, torch.full((6,), 1 / 6), 1.0).backward()
    assert logits.grad is not None
    force = (logits.grad.mean(0) @ shift_E / (shift_E @ shift_E)).item()
    assert (force > 0) is restores
    assert math.isclose(force, (0.1 / 6 - entropy_weight) / 6, rel_tol=0.02)
