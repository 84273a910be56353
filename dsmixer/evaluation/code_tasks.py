"""HumanEval and MBPP for lm-eval: a task's programs are run when its answers are filtered, several at a time.

The task files mark themselves ``unsafe_code``: lm-eval runs them only when it is told to. A task file of the
user's runs its programs here as well, by a filter ``Programs(of)`` in a module beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dsmixer.evaluation.code_run import PASSED, run_program

Record = Mapping[str, Any]


def humaneval_program(record: Record, answer: str) -> str:
    """The function's head, the answer and the tests, which call ``check`` on the function."""
    return f"{record['prompt']}{answer}\n{record['test']}\ncheck({record['entry_point']})\n"


def mbpp_program(record: Record, answer: str) -> str:
    """The answer and its assertions."""
    return "\n".join([record["test_setup_code"], answer, *record["test_list"], ""])


@dataclass(frozen=True)
class Programs:
    """A filter of lm-eval that runs programs within the limits of ``run_program``.

    By its kind a task is known to run them nowhere else.

    Attributes:
        of: the program of a record and one of its answers, with its tests.
    """

    of: Callable[[Record, str], str]

    def __call__(self, answers: Sequence[Sequence[str]], records: Sequence[Record]) -> list[list[str]]:
        """For each record and each of its answers what became of the program: ``passed``, or why not."""
        several = [[a] if isinstance(a, str) else a for a in answers]  # lm-eval's take_first leaves a text
        return _verdicts([[self.of(r, one) for one in a] for r, a in zip(records, several, strict=True)])


humaneval_verdicts = Programs(humaneval_program)
mbpp_verdicts = Programs(mbpp_program)


def runs_by_limits(filter_list: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether a task's answers all pass a ``Programs`` filter before anything else sees them.

    Args:
        filter_list: of the task's file, with its functions imported.
    """
    pipelines = [list(pipeline["filter"]) for pipeline in filter_list or ()]
    firsts = [
        next((one.get("filter_fn") for one in steps if "filter_fn" in one), None) for steps in pipelines
    ]
    return bool(firsts) and all(isinstance(first, Programs) for first in firsts)


def pass_at_1(record: Record, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of a record's answers that pass, which is what ``pass@1`` estimates."""
    verdicts = results[0]
    return {"pass@1": sum(verdict == PASSED for verdict in verdicts) / len(verdicts)}


def _verdicts(programs: Sequence[Sequence[str]]) -> list[list[str]]:
    workers = min(16, max(1, len(os.sched_getaffinity(0)) // 2))  # a program takes up to 1 GiB
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda program: run_program(program).verdict, [p for own in programs for p in own])
        return [[next(done) for _ in own] for own in programs]
