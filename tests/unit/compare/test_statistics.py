"""Means, spreads and recovered shares of a comparison against an example that was worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsmixer.compare.gather import Gathered
from dsmixer.compare.plan import Plan, make_plan
from dsmixer.compare.results import results_of
from dsmixer.compare.statistics import figure_of, recovered
from dsmixer.config.comparison import load_comparison

LAW = {0: 1.2, 1: 1.4, 2: 1.3}  # base 2, own 1: recovered 0.8, 0.6, 0.7
CHESS = {0: 2.75, 1: 2.5, 2: 3.0}  # base 3, own 2.5: recovered 0.5, 1.0, 0.0


@pytest.fixture
def plan(comparison_file: Callable[..., Path]) -> Plan:
    return make_plan(load_comparison(comparison_file(("seeds: [0, 1]", "seeds: [0, 1, 2]"))))


def row(
    plan: Plan, cell: str, seed: int, domain: str, method: str, value: float, metric: str = "loss"
) -> dict:
    variant = "RSL" if cell == "variant" else None
    common = {"variant": variant, "trunk": plan.trunks[0].digest, "seed": seed, "cell": cell}
    return {**common, "domain": domain, "method": method, "metric": metric, "value": value, "num_examples": 9}


def gathered(plan: Plan, seeds: tuple[int, ...] = (0, 1, 2)) -> Gathered:
    found = Gathered()
    trunk = plan.trunks[0].digest
    found.own_experts = {(trunk, "law"): "lawyer", (trunk, "chess"): "chess", (trunk, "flat"): "flat"}
    for seed in seeds:
        for domain, base, own in (("law", 2.0, 1.0), ("chess", 3.0, 2.5), ("flat", 1.0, 1.1)):
            found.references[trunk, seed, domain] = {"base": base, "own": own}
            expert = found.own_experts[trunk, domain]
            found.rows.append(row(plan, "experts", seed, domain, "base", base))
            found.rows.append(row(plan, "experts", seed, domain, f"expert:{expert}", own))
            found.rows.append(row(plan, "experts", seed, domain, "expert:other", 9.0))
        found.rows.append(row(plan, "experts", seed, "law", "majority", 0.6, "accuracy"))
        found.rows.append(row(plan, "method", seed, "law", "own", 1.0625))
        found.rows.append(row(plan, "method", seed, "law", "uniform", 1.5))
        found.rows.append(row(plan, "variant", seed, "law", "mixture", LAW[seed]))
        found.rows.append(row(plan, "variant", seed, "chess", "mixture", CHESS[seed]))
        found.rows.append(row(plan, "variant", seed, "flat", "mixture", 0.9))
        found.rows.append(row(plan, "variant", seed, "law", "uniform", 77.0))
    return found


def table(plan: Plan, found: Gathered) -> dict[str, dict]:
    return {entry["row"]: entry for entry in results_of(plan, found)["table"]}


def test_three_seeds_give_the_sample_standard_deviation(plan: Plan) -> None:
    cells = table(plan, gathered(plan))["RSL"]["cells"]
    law = cells["loss"]["law"]
    assert law["mean"] == pytest.approx(1.3) and law["spread"] == pytest.approx(0.1)
    assert law["spread_is"] == "standard deviation" and law["values"] == {"0": 1.2, "1": 1.4, "2": 1.3}
    share = cells["recovered"]
    assert share["law"]["mean"] == pytest.approx(0.7) and share["law"]["spread"] == pytest.approx(0.1)
    assert share["chess"]["mean"] == pytest.approx(0.5) and share["chess"]["spread"] == pytest.approx(0.5)


def test_the_mean_of_domains_is_taken_on_each_seed_first(plan: Plan) -> None:
    mean = table(plan, gathered(plan))["RSL"]["cells"]["recovered"]["mean of domains"]
    # (0.8 + 0.5) / 2, (0.6 + 1.0) / 2, (0.7 + 0.0) / 2: deviations 0.05, 0.20, -0.25, squares 0.105
    assert mean["values"] == pytest.approx({"0": 0.65, "1": 0.8, "2": 0.35})
    assert mean["mean"] == pytest.approx(0.6) and mean["spread"] == pytest.approx(0.0525**0.5)


def test_a_domain_without_a_gain_has_no_share_and_is_left_out_of_the_mean(plan: Plan) -> None:
    entry = table(plan, gathered(plan))["RSL"]
    assert "flat" not in entry["cells"]["recovered"] and "flat" in entry["cells"]["loss"]
    assert recovered(1.0, 0.9, 1.1) is None and recovered(1.0, 0.9, 1.0) is None


def test_references_are_the_base_the_majority_and_each_domain_s_own_expert(plan: Plan) -> None:
    rows = table(plan, gathered(plan))
    assert list(rows) == ["majority class", "base", "own expert", "uniform", "RSL"]
    assert [rows[name]["kind"] for name in rows] == ["reference"] * 3 + ["method", "variant"]
    own = rows["own expert"]["cells"]
    assert {domain: own["loss"][domain]["mean"] for domain in ("law", "chess")} == {"law": 1.0, "chess": 2.5}
    assert own["loss"]["law"]["values"] == {"0": 1.0, "1": 1.0, "2": 1.0}, "as its run has scored it"
    assert own["recovered"]["law"]["mean"] == 1.0 and rows["base"]["cells"]["recovered"]["law"]["mean"] == 0.0
    assert rows["majority class"]["cells"]["accuracy"]["law"]["mean"] == 0.6
    assert rows["uniform"]["cells"]["loss"]["law"]["mean"] == 1.5, "the method's, not that of a variant's run"


def test_a_method_that_is_told_the_domain_is_marked_as_such_and_is_no_rival(plan: Plan) -> None:
    found = gathered(plan)
    found.told = {(plan.trunks[0].digest, "uniform")}
    told = table(plan, found)["uniform, told the domain"]
    assert told["kind"] == "told" and told["method"] == "uniform"


def test_a_mean_of_some_domains_is_no_mean_of_all(plan: Plan) -> None:
    cells = table(plan, gathered(plan))["uniform"]["cells"]
    assert "law" in cells["loss"] and "mean of domains" not in cells["loss"]
    assert "mean of domains" not in cells["recovered"]


def test_two_seeds_give_their_range_and_one_gives_none(plan: Plan) -> None:
    two = table(plan, gathered(plan, (0, 1)))["RSL"]["cells"]["loss"]["law"]
    assert two["spread_is"] == "range" and two["spread"] == pytest.approx(0.2)
    one = table(plan, gathered(plan, (2,)))["RSL"]["cells"]["loss"]["law"]
    assert one["spread"] is None and one["spread_is"] is None and one["mean"] == 1.3
    assert figure_of({0: 1.0, 1: 1.0, 2: 1.0}).spread == 0.0
