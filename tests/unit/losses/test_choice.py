"""From a recipe's ``stage2.routing_loss`` to terms: defaults, methods, lists, and what is refused."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.nn import functional

from dsmixer.config.checks import needs_outputs
from dsmixer.config.errors import UserError
from dsmixer.config.stages import RoutingLossName, RoutingMethod, RslConfig, Stage2Config
from dsmixer.losses.balance import routing_losses
from dsmixer.losses.choice import routing_terms
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.losses.terms import RoutingTerms, published
from dsmixer.routing.modes import Routing, modes
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics


def output_of(logits_TE: torch.Tensor) -> RouterOutput:
    p_TE = torch.softmax(logits_TE, dim=1)
    return RouterOutput(logits_TE, p_TE, modes["topk"](p_TE, Routing(mode="topk", top_k=2)), None)


def test_unwritten_it_is_rsl_as_the_recipe_sets_it() -> None:
    (term,) = routing_terms(Stage2Config(rsl=RslConfig(alpha=0.3, entropy="paper_eq5", ramp=0.0))).terms
    assert isinstance(term, RoutingSpecializationLoss)
    expected = {**RslConfig(alpha=0.3, entropy="paper_eq5").model_dump()}
    expected.pop("ramp")
    assert asdict(term) == expected


def test_names_in_the_recipe_are_those_of_the_losses_and_methods_that_a_run_can_have() -> None:
    assert set(get_args(RoutingLossName)) == set(routing_losses)
    assert set(get_args(RoutingMethod)) == {*published, "none"}


def test_the_checks_before_a_run_know_which_losses_read_experts_outputs() -> None:
    """By their names alone, as no loss is made there."""
    methods = {name for name in get_args(RoutingMethod) if needs_outputs(Stage2Config(routing_loss=name))}
    losses = {
        name
        for name in get_args(RoutingLossName)
        if needs_outputs(Stage2Config(routing_loss=[{"loss": "z"}, {"loss": name}]))
    }
    assert (
        methods == {name for name, terms in published.items() if RoutingTerms(terms).on_outputs} == {"aesl"}
    )
    assert losses == {name for name in routing_losses if RoutingTerms((routing_losses[name](),)).on_outputs}
    assert losses == {"aesl_orthogonality"}


@pytest.mark.parametrize(
    "method", [name for name in get_args(RoutingMethod) if name not in ("lora_mixer", "none")]
)
def test_a_method_is_its_published_terms(method: str) -> None:
    assert routing_terms(Stage2Config(routing_loss=method)).terms == published[method]  # type: ignore[arg-type]


def test_none_is_a_loss_of_zero_with_no_usage() -> None:
    terms, output = routing_terms(Stage2Config(routing_loss="none")), output_of(torch.randn(5, 3))
    assert terms(output, terms.first_usage(1, 3)[:, 0], 1.0).item() == 0.0
    statistics = RoutingStatistics(num_routers=1, num_experts=3)
    assert terms.next_usage(statistics).shape == terms.first_usage(1, 3).shape == (0, 1, 3)


def test_a_list_is_the_weighted_sum_of_its_losses() -> None:
    listed = [
        {"loss": "z", "settings": {"weight": 0.5}},
        {"loss": "quadratic", "settings": {"alpha": 2.0, "usage_from": "micro_batch"}},
    ]
    terms = routing_terms(Stage2Config(routing_loss=listed))
    logits_TE = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p_TE = functional.softmax(logits_TE, dim=1)
    mean = 0.5 * torch.logsumexp(logits_TE, 1).square().mean() + 2.0 * p_TE.mean(0).square().sum()
    found = terms(output_of(logits_TE), terms.first_usage(1, 4)[:, 0].double(), 1.0)
    torch.testing.assert_close(found, 7 * mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (
            {"loss": "switch", "settings": {"alfa": 1}},
            r"settings\.alfa: switch has no setting 'alfa'.*alpha",
        ),
        ({"loss": "switch", "settings": {"alpha": "much"}}, r"0\.settings\.alpha: expected a number"),
        ({"loss": "switch", "settings": {"alpha": None}}, r"0\.settings\.alpha: expected a number"),
        ({"loss": "switch", "settings": {"usage": "top9"}}, r"0\.settings\.usage: 'top9' is no choice.*top1"),
        ({"loss": "mole", "settings": {"smooth_temperature": 0}}, r"smooth_temperature: 0 is not above 0"),
        ({"loss": "aesl_orthogonality", "settings": {"epsilon": 0}}, r"epsilon: 0 is not above 0"),
        ({"loss": "aesl_orthogonality", "settings": {"form": "gram"}}, r"'gram' is no choice.*paper, code"),
    ],
)
def test_a_wrong_setting_is_one_error_with_its_key(term: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="(?s)" + said) as error:
        routing_terms(Stage2Config(routing_loss=[term]))
    assert str(error.value).startswith("stage2.routing_loss.0.settings.")


def test_two_temperatures_of_one_count_are_refused() -> None:
    two = [{"loss": "mole"}, {"loss": "switch", "settings": {"usage": "smooth", "smooth_temperature": 2.0}}]
    with pytest.raises(UserError, match="temperatures"):
        routing_terms(Stage2Config(routing_loss=two))


def test_every_loss_and_method_is_in_the_page_on_losses() -> None:
    page = (Path(__file__).parents[3] / "docs" / "losses.md").read_text(encoding="utf-8")
    first_cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {*routing_losses, *published} <= set(re.findall(r"`(\w+)`", " ".join(first_cells)))
