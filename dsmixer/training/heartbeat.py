"""A heartbeat beside the collectives: a rank that dies, stops, hangs or leaves alone ends the whole job, with
its name.

Each rank has a thread that tells rank 0 every few seconds where its main thread stands, over a connection of
its own; rank 0 judges and tells all. A killed process closes its connection, so its death is known at once.
Who hears a verdict prints one line and leaves with code 1, or 75 where a signal has stopped the rank, for its
main thread may be stuck in a collective. So the collectives themselves need no short limit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

from dsmixer.config.schema import HealthConfig
from dsmixer.training.channel import Hub, Lines, Message, connect
from dsmixer.training.judge import (
    APART,
    OUTSIDE_FACTOR,
    SLOWER_SECONDS,
    Beat,
    Heard,
    Verdict,
    gone_text,
    judge,
    silent_text,
)
from dsmixer.training.leaving import FAILED, STOPPED, way_out, what_it_says
from dsmixer.training.pulse import Pulse, collectives_begun, waits_in_collective
from dsmixer.training.telling import Lossy, tell_problem
from dsmixer.training.world import LONGEST_WORK, World, gather_objects, once

INTERVAL = 1.0
"""Seconds between two beats."""
TICK = 0.25
LINGER = 2.0
"""How long rank 0 stays for the others to hear its last word."""
JUDGED_WITHIN = 5.0
"""How long a rank that has raised waits to hear whether another one's death was behind it."""
WITHOUT = timedelta(minutes=30)
"""How long a collective may take where there is no heartbeat, or ``hang_timeout`` if that is more."""
OWN_WAY = ("failed", "alone", "stopped")
"""Verdicts on a rank that has left by itself: it says why, and ends with its own code."""


@contextlib.contextmanager
def watching(world: World, health: HealthConfig) -> Iterator[Pulse]:
    """Watch over a run while it goes on. A collective at its beginning.

    Args:
        world: the ranks.
        health: ``heartbeat``, ``silence`` and ``hang_timeout`` of the recipe.

    Yields:
        The pulse that the training loop keeps.
    """
    without = max(WITHOUT, timedelta(seconds=health.hang_timeout))
    pulse = Pulse(without)
    # nobody has compared the ranks' recipes yet
    if not all(gather_objects(world, health.heartbeat)):
        pulse.give_time()
        yield pulse
        return
    with _Watch(world, health, pulse):
        yield pulse


class _Watch:
    """The watching thread of this rank, and what it knows.

    Args:
        world: the ranks.
        health: the limits.
        pulse: of the main thread.
    """

    def __init__(self, world: World, health: HealthConfig, pulse: Pulse) -> None:
        self._world, self._health, self._pulse = world, health, pulse
        names = [
            f"rank {rank} ({host}, pid {pid})"
            for rank, (host, pid) in enumerate(gather_objects(world, (socket.gethostname(), os.getpid())))
        ]
        self._heard = {rank: Heard(name, time.monotonic()) for rank, name in enumerate(names)}
        self._told = (0, False)
        self._moved: tuple[tuple[int, int], float] = ((0, 0), time.monotonic())
        self._leaves = False
        self._over, self._judged = threading.Event(), threading.Event()
        self._hub: Hub | None = None
        self._lines: Lines | None = None
        self._connect()
        self._thread = threading.Thread(target=self._run, name="dsmixer-heartbeat", daemon=True)

    def _connect(self) -> None:
        """Join rank 0's channel; where some rank can't, all go without, and rank 0 says so."""
        address, token = os.environ.get("MASTER_ADDR", "127.0.0.1"), secrets.token_hex(16)

        def open_hub() -> tuple[int, str]:
            self._hub = Hub(address, token, self._world.size)
            return self._hub.port, token

        port, token = once(self._world, open_hub)
        if self._world.rank > 0:
            self._lines = connect(address, port, token, self._world.rank)
        apart = [
            self._heard[rank].name
            for rank, there in enumerate(gather_objects(self._world, self._lines is not None))
            if rank and not there
        ]
        if apart:
            self._say_once(f"warning: no heartbeat: {apart[0]} can't reach {address}, port {port}")
            self._close()

    def _say_once(self, text: str) -> None:
        if self._world.rank == 0:
            tell_problem(text)

    def __enter__(self) -> _Watch:
        if self._hub is not None or self._lines is not None:
            self._pulse.limit = LONGEST_WORK
            self._thread.start()
        self._pulse.give_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._thread.is_alive():
            return
        self._leaves = True
        message = {
            "left": way_out(kind),
            "problem": what_it_says(kind, error),
            "beat": self._beat().to_dict(),
        }
        self._tell_last(message)
        if message["left"] == "failed":
            # this rank's own mistake, or that of a collective whose other end has died: the verdict says
            self._judged.wait(JUDGED_WITHIN)
        elif message["left"] in APART and self._hub is not None:
            self._judged.wait(SLOWER_SECONDS + JUDGED_WITHIN)  # whether the others leave so too
        self._over.set()
        self._thread.join(LINGER + JUDGED_WITHIN)

    def _tell_last(self, message: Message) -> None:
        if self._lines is not None:
            self._lines.send(message)
        else:
            self._take(0, message)

    def _run(self) -> None:
        try:
            if self._hub is not None:
                self._run_hub(self._hub)
            elif self._lines is not None:
                self._run_rank(self._lines)
            faulthandler.cancel_dump_traceback_later()  # of a watch that has broken the alarm stays
        finally:
            self._close()

    def _close(self) -> None:
        if self._hub is not None:
            self._hub.close()
        if self._lines is not None:
            self._lines.close()
        self._hub = self._lines = None

    # rank 0

    def _run_hub(self, hub: Hub) -> None:
        next_beat = 0.0
        while not self._over.is_set():
            for rank, message in hub.hear(TICK):
                self._take(rank, message)
                hub.tell(rank, {})
            now = time.monotonic()
            if (now >= next_beat or self._has_news()) and not self._heard[0].left:
                next_beat = now + INTERVAL
                self._take(0, {"beat": self._beat().to_dict()})
            limits = {"silence": self._silence, "hang_timeout": self._health.hang_timeout}
            verdict = judge(self._heard, time.monotonic(), **limits)
            if verdict is not None:
                self._announce(hub, verdict)
            if all(own.left in ("done", *APART) for own in self._heard.values()):
                self._judged.set()
        hub.tell_all({"over": True})

    @property
    def _silence(self) -> float:
        return min(self._health.silence, self._health.hang_timeout)

    @property
    def _stuck_after(self) -> float:
        """Seconds without a beat after which this process ends itself: rank 0 has given it up long before."""
        return max(self._health.silence, self._health.hang_timeout) + 2 * INTERVAL

    def _take(self, rank: int, message: Message | None) -> None:
        """What a rank has said, or that its connection has broken."""
        own = self._heard[rank]
        now = time.monotonic()
        if own.left:
            return
        if message is not None and "beat" in message:
            own.at, own.beat = now, Beat.from_dict(message["beat"])
        if message is None or "left" in message:
            own.left, own.left_at = ("gone", now) if message is None else (message["left"], now)
            own.problem = "" if message is None else message.get("problem", "")

    def _announce(self, hub: Hub, verdict: Verdict) -> None:
        """Tell all, and leave once they have heard it; a rank that has left by itself goes its own way."""
        message = {"kind": verdict.kind, "ranks": list(verdict.ranks), "text": verdict.text}
        hub.tell_all(message)
        until = time.monotonic() + LINGER
        try:
            self._say(verdict.kind, verdict.ranks, verdict.text)
            while hub.ranks and time.monotonic() < until:
                hub.hear(TICK)
        finally:
            self._leave(verdict.kind, verdict.ranks)

    # other ranks

    def _run_rank(self, lines: Lines) -> None:
        heard = time.monotonic()
        while not self._over.is_set():
            lines.send({"beat": self._beat().to_dict()})
            until = time.monotonic() + INTERVAL
            while time.monotonic() < until and not self._over.is_set() and not self._has_news():
                messages = lines.receive(TICK)
                if messages is None:
                    return self._lost_rank_0(0.0)
                for message in messages:
                    if "over" in message:
                        return self._judged.set()
                    if "kind" in message:
                        self._say(message["kind"], message["ranks"], message["text"])
                        self._leave(message["kind"], message["ranks"])
                heard = time.monotonic() if messages else heard
            place = self._pulse.place
            patience = self._silence * (1.0 if place.stage and not place.saving else OUTSIDE_FACTOR)
            if time.monotonic() - heard > patience:
                return self._lost_rank_0(time.monotonic() - heard)
        return None

    def _lost_rank_0(self, seconds: float) -> None:
        """Rank 0 has closed the connection without a word, or is silent."""
        if self._over.is_set():
            return
        self._heard[0].beat = self._beat()  # where rank 0 stood is about where this one stands
        text = silent_text(self._heard, [0], seconds) if seconds else gone_text(self._heard, [0])
        self._say("silent" if seconds else "gone", [0], text)
        self._leave("gone", [0])

    # all

    def _beat(self) -> Beat:
        """What this rank says of itself; puts off the alarm for when Python's lock keeps this thread away."""
        place, begun, now = self._pulse.place, collectives_begun(), time.monotonic()
        self._told = (place.stage, place.saving)
        if (place.mark, begun) != self._moved[0]:
            self._moved = ((place.mark, begun), now)
        if place.stage and not self._leaves:
            faulthandler.dump_traceback_later(self._stuck_after, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()
        return Beat(place, begun, now - self._moved[1], waits_in_collective())

    def _has_news(self) -> bool:
        """Whether a loop or a save has begun or ended since the last beat: then patience is another one."""
        place = self._pulse.place
        return (place.stage, place.saving) != self._told

    def _say(self, kind: str, ranks: Sequence[int], text: str) -> None:
        """One line of this rank, and its stack where it is to blame for a hang."""
        own = self._world.rank in ranks
        if kind in OWN_WAY and own:
            return
        error = "" if kind == "stopped" else "error: "
        ends = "" if own else f"; rank {self._world.rank} ends with it"
        Lossy(sys.stdout).flush()
        tell_problem(f"{error}{text}{ends}")
        if kind == "hangs" and own:
            faulthandler.dump_traceback(all_threads=True, file=sys.stderr)

    def _leave(self, kind: str, ranks: Sequence[int]) -> None:
        if not (kind in OWN_WAY and self._world.rank in ranks):
            _leave_now(STOPPED if kind == "stopped" else FAILED)
        self._over.set()
        self._judged.set()


def _leave_now(code: int) -> NoReturn:
    try:
        Lossy(sys.stdout).flush()
        Lossy(sys.stderr).flush()
    finally:
        os._exit(code)
