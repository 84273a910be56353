"""Matching of names against patterns, also as a process of its own that may not take long.

``re`` searches by trial, which some patterns make exponential, and it can't be interrupted. Run as a script
with a task on standard input, this ends itself when it has used up its time or memory. It needs nothing but
the standard library, so that it starts in a few hundredths of a second.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Sequence

Found = tuple[int, str | None] | None
"""Which pattern matched first, and its group ``idx``, if it has one."""


def first_matches(patterns: Sequence[str], names: Sequence[str], full: bool) -> list[Found]:
    """For each name, the first pattern that matches it.

    Args:
        patterns: regular expressions, in order.
        names: what they are matched against.
        full: whether the whole name has to match, or its beginning.

    Raises:
        re.error: a pattern is broken.
    """
    compiled = [re.compile(pattern) for pattern in patterns]
    return [_first(compiled, name, full) for name in names]


def _first(compiled: Sequence[re.Pattern[str]], name: str, full: bool) -> Found:
    for index, pattern in enumerate(compiled):
        match = pattern.fullmatch(name) if full else pattern.match(name)
        if match is not None:
            return index, match.groupdict().get("idx")
    return None


def main() -> None:
    """Read a task, do it within its limits and write what was found, or what is wrong with a pattern."""
    task = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (task["bytes"], task["bytes"]))
    # its default action ends the process, also in the midst of a search
    signal.setitimer(signal.ITIMER_VIRTUAL, task["seconds"])
    try:
        answer: dict[str, object] = {"found": first_matches(task["patterns"], task["names"], task["full"])}
    except (re.error, RecursionError, OverflowError) as error:
        answer = {"error": str(error) or type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
