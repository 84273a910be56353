"""What the ranks' signs of life mean: which of them is gone, silent, has failed or hangs.

Pure arithmetic on what rank 0 has heard, so that it can be tested without a clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsmixer.training.pulse import Place

GATHER_SECONDS = 0.5
"""How long after a rank is gone others are waited for that went with it, such as all of a node."""
FAILED_SECONDS = 2.0
"""How long after a rank has raised a death behind it is waited for: a collective fails on those who live."""
OUTSIDE_FACTOR = 10.0
"""How much more patience there is outside the loops and in a save: there libraries may hold Python's lock."""
MEDIANS = 10.0
"""A step may take this many median steps before it counts as a hang."""
SAVE_SECONDS, LONGEST_SAVES = 1800.0, 10.0
"""A save may stand still for so many seconds, or for so many of the longest one so far."""
ALONE_SECONDS = 5.0
"""How long all others wait in a collective, after a rank has left by itself, before that is told."""
SLOWER_SECONDS = 30.0
"""The same where another is still at work: it may be about to find what that rank has found."""
APART = ("stopped", "refused", "ended")
"""Ways to leave in good order, if all ranks leave so together."""
SHOWN = 8

GO_ON = "run the same command again to go on from the last checkpoint"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself every few seconds.

    Attributes:
        place: where it stands.
        collectives: that it has begun, see ``pulse.collectives_begun``.
        still: seconds in which neither has changed.
        waits: whether its main thread stands in a collective.
    """

    place: Place = field(default_factory=Place)
    collectives: int = 0
    still: float = 0.0
    waits: bool = False

    @property
    def position(self) -> tuple[int, int, int, int]:
        return self.place.stage, self.place.step, self.place.mark, self.collectives

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "place": vars(self.place)}

    @staticmethod
    def from_dict(given: Mapping[str, Any]) -> Beat:
        return Beat(**{**given, "place": Place(**given["place"])})


@dataclass
class Heard:
    """What rank 0 knows of a rank.

    Attributes:
        name: ``rank 2 (node-b, pid 4711)``.
        at: when it was last heard.
        beat: what it said.
        left: ``done``; ``stopped`` by a signal, ``refused`` what the user gave, ``ended`` by what all ranks
            see together; ``failed``, it raised; ``gone``, its connection broke; or nothing: it is there.
        left_at: when.
        problem: what it said then.
    """

    name: str
    at: float
    beat: Beat = field(default_factory=Beat)
    left: str = ""
    left_at: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Verdict:
    """Why the job ends.

    Attributes:
        kind: ``gone``, ``silent``, ``failed``, ``hangs``, ``alone`` or ``stopped``.
        ranks: those to blame.
        text: a line for people.
    """

    kind: str
    ranks: tuple[int, ...]
    text: str


def judge(heard: Mapping[int, Heard], now: float, *, silence: float, hang_timeout: float) -> Verdict | None:
    """What is wrong with the job, if anything.

    Args:
        heard: of every rank.
        now: on the clock of ``Heard.at``.
        silence: seconds without a sign of life after which a rank counts as lost, in a step of the loops.
        hang_timeout: seconds without progress inside the loops; a save has at least ``SAVE_SECONDS``.
    """
    for kind, after in (("gone", GATHER_SECONDS), ("failed", FAILED_SECONDS)):
        left = [rank for rank, own in heard.items() if own.left == kind]
        if not left:
            continue
        first = min(heard[rank].left_at for rank in left)
        if now - first < after:
            return None
        if kind == "gone":
            return _gone(heard, left)
        return _left_before(heard, first) or _failed(heard, left)
    living = {rank: own for rank, own in heard.items() if not own.left}
    alone = _alone(heard, living, now)
    if alone is not None:
        return alone
    if _is_patient([own.beat.place for own in living.values()]):
        silence *= OUTSIDE_FACTOR
    silent = [rank for rank, own in living.items() if now - own.at > silence]
    if silent:
        seconds = max(now - heard[rank].at for rank in silent)
        return Verdict("silent", tuple(silent), silent_text(heard, silent, seconds))
    return _hang(living, now, hang_timeout)


def _is_patient(places: Sequence[Place]) -> bool:
    """Whether the ranks are outside the loops, or in a save: those that are furthest on, for the last word of
    one that was stopped after a save may be that it saves."""
    if not any(place.stage for place in places):
        return True
    furthest = max(place.mark for place in places)
    return any(place.saving for place in places if place.mark == furthest)


def _alone(heard: Mapping[int, Heard], living: Mapping[int, Heard], now: float) -> Verdict | None:
    """A rank that has left in good order, and others that have not followed it."""
    stuck = all(own.beat.waits and own.beat.still + now - own.at >= ALONE_SECONDS for own in living.values())
    return _left_before(heard, now - (ALONE_SECONDS if stuck else SLOWER_SECONDS)) if living else None


def _left_before(heard: Mapping[int, Heard], then: float) -> Verdict | None:
    """The first rank that has left in good order, if that was before a time."""
    apart = [rank for rank, own in heard.items() if own.left in APART and own.left_at <= then]
    if not apart:
        return None
    first = min(apart, key=lambda rank: heard[rank].left_at)
    own = heard[first]
    if own.left == "stopped":
        text = f"{own.name} was stopped by a signal {own.beat.place.text()}: {own.problem}; {GO_ON}"
        return Verdict("stopped", (first,), text)
    mend = "mend that, then " if own.left == "refused" else ""
    text = f"{own.name} left alone {own.beat.place.text()}: {own.problem}; {mend}{GO_ON}"
    return Verdict("alone", (first,), text)


def _named(heard: Mapping[int, Heard], ranks: Sequence[int]) -> str:
    more = len(ranks) - SHOWN
    return ", ".join(heard[rank].name for rank in ranks[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _are(ranks: Sequence[int], one: str, several: str) -> str:
    return one if len(ranks) == 1 else several


def _gone(heard: Mapping[int, Heard], ranks: list[int]) -> Verdict:
    return Verdict("gone", tuple(ranks), gone_text(heard, ranks))


def gone_text(heard: Mapping[int, Heard], ranks: Sequence[int]) -> str:
    """Of ranks whose connection broke without a word."""
    last = heard[ranks[0]].beat.place.text()
    return (
        f"{_named(heard, ranks)} {_are(ranks, 'is', 'are')} gone, last heard {last}: "
        f"killed or crashed (out of memory, a segmentation fault). Look at its own output above, and for "
        f'"Out of memory" in the kernel\'s log of its machine; {GO_ON}'
    )


def silent_text(heard: Mapping[int, Heard], ranks: Sequence[int], seconds: float) -> str:
    """Of ranks that have not been heard for so long."""
    last = heard[ranks[0]].beat.place.text()
    return (
        f"{_named(heard, ranks)} {_are(ranks, 'has', 'have')} given no sign of life for {seconds:.0f} s, "
        f"last heard {last}: stopped, or the machine or its network is down; {GO_ON}"
    )


def _failed(heard: Mapping[int, Heard], ranks: list[int]) -> Verdict:
    first = min(ranks, key=lambda rank: heard[rank].left_at)
    own, more = heard[first], len(ranks) - 1
    also = f" ({more} more rank{'s' * (more > 1)} failed with it)" if more else ""
    return Verdict(
        "failed", (first,), f"{own.name} failed {own.beat.place.text()}: {own.problem}{also}; {GO_ON}"
    )


def _longest_wait(place: Place) -> float:
    """Seconds in which a step, or a save, may stand still, by what those before it have taken."""
    if place.saving:
        return max(SAVE_SECONDS, LONGEST_SAVES * place.longest_save)
    return MEDIANS * place.median


def _hang(living: Mapping[int, Heard], now: float, hang_timeout: float) -> Verdict | None:
    """The rank that is furthest behind, where it has not moved for too long."""
    if not living or any(not own.beat.place.stage for own in living.values()):
        return None
    least = min(own.beat.position for own in living.values())
    behind = [rank for rank, own in living.items() if own.beat.position == least]
    still = min(living[rank].beat.still + now - living[rank].at for rank in behind)
    place = living[behind[0]].beat.place
    if still <= max(hang_timeout, _longest_wait(place)):
        return None
    if len(behind) > 1:  # equally far: the one to blame is the one that does not wait for others
        behind = [rank for rank in behind if not living[rank].beat.waits] or behind
    others = "" if len(behind) == len(living) else ", and the others wait for it"
    disk = "; the file system of that folder may not answer" if place.saving else ""
    return Verdict(
        "hangs",
        tuple(behind),
        f"{_named(living, behind)} {_are(behind, 'hangs', 'hang')}: no progress for {still:.0f} s, "
        f"{place.text()}{others}{disk}; the stack stands in the output of "
        f"{_are(behind, 'its', 'their')} node; {GO_ON}",
    )
