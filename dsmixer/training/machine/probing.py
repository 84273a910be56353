"""Runs the probe of the libraries in children until each of its steps has an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmixer.training.machine.child import Child, Ended, python_child
from dsmixer.training.machine.probe import MARK, STEPS

MODULE = "dsmixer.training.machine.probe"


@dataclass(frozen=True)
class Answer:
    """What came of one step.

    Attributes:
        facts: what it found; empty where it failed.
        trouble: why it failed, in a line; None if it did not.
        needed: the failed step that this one needs, so that it was not tried.
    """

    facts: Mapping[str, Any]
    trouble: str | None = None
    needed: str | None = None

    @property
    def failed(self) -> bool:
        return self.trouble is not None


Answers = Mapping[str, Answer]


def start_probe(seconds: float, steps: Sequence[str] = tuple(STEPS)) -> Child:
    """Begin with these steps, without waiting."""
    return python_child(MODULE, steps, seconds)


def collect(child: Child, seconds: float) -> Answers:
    """The answers of all steps: of this child, and of others for what is left where a step ended it.

    Args:
        child: from ``start_probe``, with all steps.
        seconds: how long a child may take.
    """
    answers: dict[str, Answer] = {}
    left = list(STEPS)
    ended = child.ended()
    while True:
        left = _take(answers, left, ended)
        if not left:
            return answers
        with start_probe(seconds, left) as child:
            ended = child.ended()


def _take(answers: dict[str, Answer], asked: Sequence[str], ended: Ended) -> list[str]:
    """Add a child's answers, and that of the step it died in; the steps that are still to be tried."""
    for line in ended.out.splitlines():
        if line.startswith(MARK):
            told = json.loads(line.removeprefix(MARK))
            answers[told["step"]] = Answer(told["facts"])
    left = [step for step in asked if step not in answers]
    if left:
        answers[left[0]] = Answer({}, ended.trouble or "it ended without an answer")
    return _without_hopeless(answers, left[1:])


def _without_hopeless(answers: dict[str, Answer], left: Sequence[str]) -> list[str]:
    """Answer the steps that need one which failed; the others."""
    kept = []
    for step in left:
        failed = [need for need in STEPS[step][1] if need in answers and answers[need].failed]
        if failed:
            answers[step] = Answer({}, f"not looked at, because {failed[0]} fails", failed[0])
        else:
            kept.append(step)
    return kept
