"""The terms of RSL in the row of a step, against the loss itself with one of its weights at 0."""

from __future__ import annotations

import pytest
import torch

from dsmixer.config.stages import RslConfig, Stage2Config
from dsmixer.losses.choice import routing_terms
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.losses.terms import RoutingTerms
from dsmixer.report.curves import balance_figures
from dsmixer.report.routing_terms import BALANCE, ENTROPY, TOTAL
from dsmixer.report.routing_terms import routing_terms as shown_terms
from dsmixer.report.run_folder import read_run
from dsmixer.routing.modes import Choice
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics
from dsmixer.training.metrics import MetricsLog, routing_metrics
from dsmixer.training.stage_logs import rsl_terms

RAMP, USAGE_E = 0.4, torch.tensor([0.5, 0.2, 0.2, 0.1])


@pytest.fixture
def outputs():
    """Two routers, 12 tokens, 4 experts."""
    logits = 2 * torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = []
    for logits_TE in logits:
        p_TE = logits_TE.softmax(1)
        weights_TK, indices_TK = p_TE.topk(2, dim=1)
        found.append(RouterOutput(logits_TE, p_TE, Choice(indices_TK, weights_TK), None))
    return found


def mean_loss(loss, outputs):
    """Over routers and tokens, as a step reports it."""
    return float(sum(loss(output, USAGE_E.double(), RAMP) for output in outputs)) / (2 * 12)


@pytest.mark.parametrize("entropy", ["specialize", "paper_eq5"])
def test_each_term_is_the_loss_without_the_other(outputs, entropy):
    weights = {"alpha": 0.3, "entropy_weight": 0.07, "entropy": entropy}
    statistics = RoutingStatistics(2, 4)
    for router, output in enumerate(outputs):
        statistics.record(router, output, None)
    logged = routing_metrics(statistics)["routing_entropy"]
    config = Stage2Config(rsl=RslConfig(**weights))
    total = mean_loss(RoutingSpecializationLoss(**weights), outputs)
    terms = rsl_terms(routing_terms(config), RAMP, total, logged)
    balance = mean_loss(RoutingSpecializationLoss(**{**weights, "entropy_weight": 0.0}), outputs)
    of_entropy = mean_loss(RoutingSpecializationLoss(**{**weights, "alpha": 0.0}), outputs)
    assert terms == pytest.approx({"rsl_balance": balance, "rsl_entropy": of_entropy}, rel=1e-5)


@pytest.mark.parametrize("losses", ["switch", "none", [{"loss": "rsl"}, {"loss": "switch"}]])
def test_another_loss_has_no_such_terms(losses):
    assert rsl_terms(routing_terms(Stage2Config(routing_loss=losses)), 1.0, 0.5, 1.2) == {}
    assert rsl_terms(RoutingTerms(()), 1.0, 0.5, 1.2) == {}


def test_the_report_of_a_run_that_goes_on_shows_the_terms_it_logged(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")  # neither weights nor a number of steps
    with MetricsLog(tmp_path, restored=None) as log:
        for step in (1, 2):
            terms = {"rsl": 0.5 * step, "rsl_balance": 0.1 * step, "rsl_entropy": 0.4 * step}
            log.write(2, step, {**terms, "routing_entropy": 9.0})
    run = read_run(tmp_path)
    found = {label: values.tolist() for label, (_, values) in shown_terms(run).items()}
    assert found == {TOTAL: [0.5, 1.0], BALANCE: [0.1, 0.2], ENTROPY: [0.4, 0.8]}
    assert next(title for title, _ in balance_figures(run)) == "Routing loss and its terms"
