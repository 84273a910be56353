"""Progress of passes: as many batches as there were, a line now and then, or a bar."""

from __future__ import annotations

import io

from dsmixer.cli.passes import EVERY_SECONDS, Passes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_away_from_a_terminal_a_line_comes_at_the_beginning_and_now_and_then() -> None:
    stream, now = io.StringIO(), [0.0]
    passes = Passes(stream, clock=lambda: now[0])
    for what, total in (("scoring", 40), ("measuring", 2)):
        with passes.of(what, total):
            for _ in range(total):
                now[0] += 0.3 * EVERY_SECONDS
                passes.tick()
    lines = stream.getvalue().splitlines()
    told = [f"scoring: batch {batch} of 40" for batch in range(4, 41, 4)]
    assert lines == ["scoring: 40 batches", *told, "measuring: 2 batches"]


def test_on_a_terminal_it_is_a_bar_that_counts() -> None:
    stream = Terminal()
    passes = Passes(stream)
    with passes.of("scoring", 3):
        for _ in range(3):
            passes.tick()
    assert "scoring: 100%" in stream.getvalue() and "3/3" in stream.getvalue()
