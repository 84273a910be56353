"""What rank 0 makes of what it has heard."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dsmixer.training.judge import (
    ALONE_SECONDS,
    FAILED_SECONDS,
    GATHER_SECONDS,
    SLOWER_SECONDS,
    Beat,
    Heard,
    Verdict,
    judge,
)
from dsmixer.training.pulse import Place, Pulse

SILENCE, HANG = 30.0, 600.0
NOW = 10_000.0


def heard(rank: int, *, ago: float = 1.0, **beat: object) -> Heard:
    place = Place(stage=1, step=5, mark=50, phase="micro-batch 1 of 2", median=2.0)
    return Heard(f"rank {rank} (node-{rank}, pid 4{rank})", NOW - ago, Beat(**{"place": place, **beat}))  # type: ignore[arg-type]


def at(step: int, mark: int, *, saving: bool = False, median: float = 2.0, stage: int = 1) -> Place:
    return Place(stage=stage, step=step, mark=mark, phase="reading its batch", saving=saving, median=median)


def verdict(*ranks: Heard, hang: float = HANG) -> Verdict | None:
    return judge(dict(enumerate(ranks)), NOW, silence=SILENCE, hang_timeout=hang)


def test_ranks_that_are_heard_and_move_are_left_alone() -> None:
    assert verdict(heard(0), heard(1, ago=29)) is None


def test_a_broken_connection_is_told_with_all_that_broke_with_it() -> None:
    left = [heard(1), heard(2)]
    for own in left:
        own.left, own.left_at = "gone", NOW - GATHER_SECONDS
    found = verdict(heard(0), *left)
    assert found is not None and (found.kind, found.ranks) == ("gone", (1, 2))
    assert (
        "rank 1 (node-1, pid 41), rank 2 (node-2, pid 42) are gone, last heard in step 5 of stage 1"
        in found.text
    )


def test_a_death_just_now_is_not_told_before_others_could_be_heard_of() -> None:
    own = heard(1)
    own.left, own.left_at = "gone", NOW - GATHER_SECONDS / 2
    assert verdict(heard(0), own) is None


def test_a_clean_end_is_none_of_its_business() -> None:
    own = heard(1, ago=1000)
    own.left, own.left_at = "done", NOW - 1000
    assert verdict(heard(0), own) is None


def test_a_death_goes_before_the_failures_that_it_causes() -> None:
    dead, failed = heard(1), heard(2)
    dead.left, dead.left_at = "gone", NOW - 3
    failed.left, failed.left_at, failed.problem = (
        "failed",
        NOW - 3.5,
        "RuntimeError: Connection reset by peer",
    )
    found = verdict(heard(0), dead, failed)
    assert found is not None and (found.kind, found.ranks) == ("gone", (1,))


def test_of_several_failures_the_first_is_named() -> None:
    failed = [heard(1), heard(2)]
    for i, own in enumerate(failed):
        own.left, own.left_at, own.problem = "failed", NOW - FAILED_SECONDS - 1 + i, f"OSError: disk {i + 1}"
    found = verdict(heard(0), *failed)
    assert found is not None and (found.kind, found.ranks) == ("failed", (1,))
    assert "OSError: disk 1 (1 more rank failed with it)" in found.text


def left(rank: int, way: str, ago: float, problem: str = "law.jsonl:3: no completion") -> Heard:
    own = heard(rank, place=Place(phase="setting up"))
    own.left, own.left_at, own.problem = way, NOW - ago, problem
    return own


def stuck(rank: int, still: float = 10.0) -> Heard:
    return heard(rank, place=Place(phase="setting up"), still=still, waits=True)


@pytest.mark.parametrize("way", ["refused", "ended"])
def test_a_rank_that_has_left_alone_is_told_once_all_others_wait_in_a_collective(way: str) -> None:
    assert verdict(stuck(0), left(1, way, ALONE_SECONDS - 1)) is None
    assert verdict(stuck(0, still=1.0), left(1, way, ALONE_SECONDS + 1)) is None
    found = verdict(stuck(0), left(1, way, ALONE_SECONDS + 1))
    assert found is not None and (found.kind, found.ranks) == ("alone", (1,))
    told = "left alone outside the training loop (setting up): law.jsonl:3: no completion"
    assert f"rank 1 (node-1, pid 41) {told}" in found.text


def test_a_rank_at_work_is_given_longer_to_find_what_another_has_found() -> None:
    assert verdict(heard(0), left(1, "refused", ALONE_SECONDS + 1)) is None
    assert verdict(heard(0), left(1, "refused", SLOWER_SECONDS + 1)) is not None


def test_ranks_that_have_all_left_are_nobody_s_business() -> None:
    assert verdict(left(0, "refused", 1000), left(1, "refused", 1000)) is None
    assert verdict(left(0, "done", 1000), left(1, "stopped", 1000)) is None


def test_rank_0_too_is_told_where_it_has_left_alone() -> None:
    found = verdict(left(0, "refused", ALONE_SECONDS + 1), stuck(1))
    assert found is not None and (found.kind, found.ranks) == ("alone", (0,))


def test_a_rank_that_a_signal_has_stopped_is_told_so() -> None:
    found = verdict(stuck(0), left(1, "stopped", ALONE_SECONDS + 1, "stopped after training"))
    assert found is not None and (found.kind, found.ranks) == ("stopped", (1,))
    assert "was stopped by a signal outside the training loop (setting up): stopped after" in found.text


def test_a_collective_that_failed_because_a_rank_had_left_is_not_the_cause() -> None:
    """With the process of the one that left goes its end of every collective."""
    failed = left(0, "failed", FAILED_SECONDS + 1, "RuntimeError: Connection closed by peer")
    found = verdict(failed, left(1, "stopped", FAILED_SECONDS + 2))
    assert found is not None and (found.kind, found.ranks) == ("stopped", (1,))
    found = verdict(failed, left(1, "stopped", FAILED_SECONDS))
    assert found is not None and (found.kind, found.ranks) == ("failed", (0,))


def test_a_rank_stopped_after_a_save_that_others_have_left_is_not_taken_for_saving() -> None:
    before = heard(1, ago=31, place=at(3, 40, saving=True))
    found = verdict(heard(0, place=at(5, 50)), before)
    assert found is not None and (found.kind, found.ranks) == ("silent", (1,))


def test_silence_counts_in_a_step_and_ten_times_as_late_outside_the_loop_and_in_a_save() -> None:
    found = verdict(heard(0), heard(1, ago=31))
    assert found is not None and (found.kind, found.ranks) == ("silent", (1,))
    assert "no sign of life for 31 s" in found.text
    outside = [heard(0, place=Place()), heard(1, ago=31, place=Place())]
    assert verdict(*outside) is None
    assert verdict(heard(0, place=at(5, 50, saving=True)), heard(1, ago=31)) is None
    outside[1].at = NOW - 301
    assert verdict(*outside) is not None


def test_who_was_stopped_before_its_first_word_from_the_loop_is_told_as_soon_as_in_it() -> None:
    assert verdict(heard(0), heard(1, ago=31, place=Place())) is not None


def test_the_rank_that_is_behind_hangs_not_those_that_wait_for_it() -> None:
    waiting = [heard(rank, place=at(5, 55), still=700.0, waits=True) for rank in (0, 2)]
    found = verdict(waiting[0], heard(1, place=at(5, 52), still=700.0), waiting[1])
    assert found is not None and (found.kind, found.ranks) == ("hangs", (1,))
    assert (
        "no progress for 701 s, in step 5 of stage 1 (reading its batch), and the others wait" in found.text
    )


def test_of_ranks_equally_far_the_one_with_fewer_collectives_or_outside_of_one_hangs() -> None:
    fewer = [heard(0, collectives=8, still=700.0), heard(1, collectives=7, still=700.0)]
    found = verdict(*fewer)
    assert found is not None and found.ranks == (1,)
    outside = [heard(0, still=700.0, waits=True), heard(1, still=700.0, waits=False)]
    found = verdict(*outside)
    assert found is not None and found.ranks == (1,)
    found = verdict(heard(0, still=700.0, waits=True), heard(1, still=700.0, waits=True))
    assert found is not None and found.ranks == (0, 1) and "the others" not in found.text


@pytest.mark.parametrize(("still", "median", "told"), [(550, 2, False), (650, 2, True), (650, 70, False)])
def test_a_hang_takes_the_timeout_or_ten_median_steps(still: float, median: float, told: bool) -> None:
    ranks = [heard(rank, place=at(5, 50, median=median), still=float(still)) for rank in (0, 1)]
    assert (verdict(*ranks) is not None) is told


@pytest.mark.parametrize(
    ("still", "longest", "told"), [(1700, 0, False), (1900, 0, True), (1900, 300, False), (3100, 300, True)]
)
def test_a_save_hangs_after_half_an_hour_or_ten_times_the_longest_one(
    still: float, longest: float, told: bool
) -> None:
    place = replace(at(5, 50, saving=True), phase="saving to /runs/mini", longest_save=float(longest))
    saving = heard(1, place=place, still=float(still))
    found = verdict(heard(0, place=replace(place, mark=51), waits=True), saving)
    assert (found is not None) is told
    if found is not None:
        assert (found.kind, found.ranks) == ("hangs", (1,)) and "rank 1 (node-1, pid 41) hangs" in found.text
        assert "(saving to /runs/mini), and the others wait for it; the file system of that" in found.text


def test_what_is_not_in_the_loop_is_no_hang() -> None:
    assert verdict(heard(0, place=Place(), still=9000.0), heard(1, place=Place(), still=9000.0)) is None


def test_a_beat_comes_through_json_as_it_was() -> None:
    beat = Beat(at(7, 90), 12, 3.5, True)
    assert Beat.from_dict(json.loads(json.dumps(beat.to_dict()))) == beat


def test_the_pulse_moves_on_through_a_step_and_stays_where_an_error_came() -> None:
    pulse = Pulse()
    with pulse.inside(2):
        pulse.begin_step(4)
        marks = [pulse.place.mark]
        pulse.enter("updating")
        pulse.end_step(3.0)
        marks.append(pulse.place.mark)
        with pulse.saving("/runs/mini"):
            assert pulse.place.saving and pulse.place.phase == "saving to /runs/mini"
        assert pulse.place.longest_save > 0.0
        assert (
            not pulse.place.saving
            and pulse.place.median == 3.0
            and pulse.place.text().startswith("in step 4")
        )
        marks.append(pulse.place.mark)
    assert marks == sorted(set(marks)) and pulse.place.stage == 0
    with pytest.raises(OSError), pulse.inside(1):
        raise OSError
    assert pulse.place.stage == 1
