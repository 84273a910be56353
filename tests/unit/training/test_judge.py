"""What rank 0 makes of what it has heard."""

from __future__ import annotations

import json

import pytest

from dsmixer.training.judge import FAILED_SECONDS, GATHER_SECONDS, Beat, Heard, Verdict, judge
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
    own.left, own.left_at = "bye", NOW - 1000
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


def test_a_long_save_and_what_is_not_in_the_loop_are_no_hang() -> None:
    assert verdict(heard(0, place=at(5, 50, saving=True), still=9000.0), heard(1, place=at(5, 51))) is None
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
        with pulse.saving():
            assert pulse.place.saving
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
