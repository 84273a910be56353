"""Losses of other methods in real runs: the same in every layout, and after a resume."""

from __future__ import annotations

from typing import Any

import pytest
from support.comparing import distance, same_bits
from support.launching import TIMEOUT_SECONDS

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)


def test_losses_of_every_kind_are_the_same_on_one_rank_and_spread_over_two(runs: Any) -> None:
    """With the usage of the step before, so that accumulation and ranks do not enter."""
    one, spread = runs["terms_one"], runs["terms_spread"]
    apart = distance(spread, one, runs.start("terms_one"))
    print(f"terms_spread: {apart}")
    assert apart.within(), str(apart)
    assert not bool((one.column("rsl", 2) == runs["w1z1"].column("rsl", 2)).any()), "another loss than RSL"


def test_the_usages_of_all_terms_are_kept_in_a_checkpoint(runs: Any) -> None:
    same_bits(runs["terms_stopped"], runs["terms_spread"])
