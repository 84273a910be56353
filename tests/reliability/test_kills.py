"""Three real kills of a two-rank run; a hundred are in ``kills.py`` and, with ``DSMIXER_LONG=1``, here."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from reliability.kills import NUM_SAVES, Kill, Trials, draw_kills, kill_all
from support.forked import RankServer
from support.launching import TIMEOUT_SECONDS

LONG = os.environ.get("DSMIXER_LONG") == "1"
SHORT_SECONDS = 120.0
"""For the short form, once the server has imported what the ranks need."""


@pytest.mark.timeout(6 * TIMEOUT_SECONDS)
def test_a_run_killed_in_saves_and_between_them_ends_bit_for_bit_as_one_left_alone(tmp_path: Path) -> None:
    """In the short form: half way through the first save, the whole job; in the saves of the next start, one
    rank; then the whole job in the middle."""
    draw = random.Random(0)
    with RankServer(tmp_path) as server:
        trials = Trials(tmp_path, server)
        trials.leave_alone()
        began = time.monotonic()
        assert min(trials.points) > 2 * NUM_SAVES, "the saves have points to be killed at"
        if LONG:
            kills = draw_kills(trials, 40, 60, draw)
        else:
            kills = [
                Kill("point", trials.points[0] // NUM_SAVES // 2, True, 0),
                Kill("point", trials.points[1] // NUM_SAVES + 2, False, 1),
                Kill("instant", 0.5, True, 0),
            ]
        told = kill_all(trials, kills, draw)
        seconds = time.monotonic() - began
    assert told["killed"] == len(kills)
    assert LONG or seconds < SHORT_SECONDS
