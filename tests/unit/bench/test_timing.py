"""Rounds, medians and ratios."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench.timing import in_rounds, ratios, seconds, spread


def test_all_take_turns_in_every_round_in_changing_order() -> None:
    seen: list[str] = []

    def turn(name: str) -> list[float]:
        seen.append(name)
        return [float(len(seen))]

    found = in_rounds({name: lambda name=name: turn(name) for name in "abc"}, 3)
    assert "".join(seen) == "abccbaabc"
    assert found == {"a": [1.0, 6.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 4.0, 9.0]}


def test_the_median_of_a_turn_counts() -> None:
    assert in_rounds({"one": lambda: [1.0, 100.0, 2.0]}, 2) == {"one": [2.0, 2.0]}


def test_spread_is_that_of_numpy() -> None:
    values = np.random.default_rng(0).exponential(size=11)
    found = spread(list(values))
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    assert (found.low, found.median, found.high) == pytest.approx((low, middle, high))
    assert found.number == 11
    assert spread([3.0]).low == spread([3.0]).high == 3.0


def test_a_machine_that_gets_slower_changes_no_ratio() -> None:
    """Both are twice as slow in each round that follows: medians mislead, ratios within rounds do not."""
    slower = [2.0**number for number in range(7)]
    found = ratios([1.5 * factor for factor in slower], slower)
    assert (found.low, found.median, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_what_is_measured_ends_when_it_has_finished() -> None:
    order: list[str] = []
    seconds(lambda: order.append("work"), 0, lambda: order.append("finished"))
    assert order == ["work", "finished"]
