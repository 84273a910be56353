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
        left: ``bye`` (a clean end), ``gone`` (its connection broke), ``failed`` (it raised), or nothing.
        left_at: when.
        problem: what it raised.
    """

    name: str
    at: float
    beat: Beat = field(default_factory=Beat)
    left: str = ""
    left_at: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Verdict:
    """Why the job ends: ``kind`` is gone, silent, failed or hangs, ``ranks`` are those to blame."""

    kind: str
    ranks: tuple[int, ...]
    text: str


def judge(heard: Mapping[int, Heard], now: float, *, silence: float, hang_timeout: float) -> Verdict | None:
    """What is wrong with the job, if anything.

    Args:
        heard: of every rank.
        now: on the clock of ``Heard.at``.
        silence: seconds without a sign of life after which a rank counts as lost, in a step of the loops.
        hang_timeout: seconds without progress inside the loops.
    """
    for kind, after in (("gone", GATHER_SECONDS), ("failed", FAILED_SECONDS)):
        left = [rank for rank, own in heard.items() if own.left == kind]
        if left and now - min(heard[rank].left_at for rank in left) >= after:
            return _gone(heard, left) if kind == "gone" else _failed(heard, left)
        if left:
            return None
    living = {rank: own for rank, own in heard.items() if not own.left}
    places = [own.beat.place for own in living.values()]
    if not any(place.stage for place in places) or any(place.saving for place in places):
        silence *= OUTSIDE_FACTOR
    silent = [rank for rank, own in living.items() if now - own.at > silence]
    if silent:
        seconds = max(now - heard[rank].at for rank in silent)
        return Verdict("silent", tuple(silent), silent_text(heard, silent, seconds))
    return _hang(living, now, hang_timeout)


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
        f"killed, by the system for want of memory as a rule, or crashed; {GO_ON}"
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


def _hang(living: Mapping[int, Heard], now: float, hang_timeout: float) -> Verdict | None:
    """The rank that is furthest behind, where it has not moved for too long."""
    if not living or any(not own.beat.place.stage for own in living.values()):
        return None
    least = min(own.beat.position for own in living.values())
    behind = [rank for rank, own in living.items() if own.beat.position == least]
    still = min(living[rank].beat.still + now - living[rank].at for rank in behind)
    place = living[behind[0]].beat.place
    if place.saving or still <= max(hang_timeout, MEDIANS * place.median):
        return None
    if len(behind) > 1:  # equally far: the one to blame is the one that does not wait for others
        behind = [rank for rank in behind if not living[rank].beat.waits] or behind
    others = "" if len(behind) == len(living) else ", and the others wait for it"
    return Verdict(
        "hangs",
        tuple(behind),
        f"{_named(living, behind)} {_are(behind, 'hangs', 'hang')}: no progress for {still:.0f} s, "
        f"{place.text()}{others}; the stack stands in the output of "
        f"{_are(behind, 'its', 'their')} node; {GO_ON}",
    )
