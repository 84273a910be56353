"""HumanEval and MBPP for lm-eval: a task's programs are run when its answers are filtered, several at a time.

The task files mark themselves ``unsafe_code``: lm-eval runs them only when it is told to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dsmixer.evaluation.code_run import PASSED, run_program

Record = Mapping[str, Any]


def humaneval_program(record: Record, answer: str) -> str:
    """The function's head, the answer and the tests, which call ``check`` on the function."""
    return f"{record['prompt']}{answer}\n{record['test']}\ncheck({record['entry_point']})\n"


def mbpp_program(record: Record, answer: str) -> str:
    """The answer and its assertions."""
    return "\n".join([record["test_setup_code"], answer, *record["test_list"], ""])


def humaneval_verdicts(answers: Sequence[Sequence[str]], records: Sequence[Record]) -> list[list[str]]:
    """A filter of lm-eval: for each record and each of its answers what became of the program."""
    return _verdicts(
        [[humaneval_program(r, one) for one in a] for r, a in zip(records, answers, strict=True)]
    )


def mbpp_verdicts(answers: Sequence[Sequence[str]], records: Sequence[Record]) -> list[list[str]]:
    """As ``humaneval_verdicts``."""
    return _verdicts([[mbpp_program(r, one) for one in a] for r, a in zip(records, answers, strict=True)])


def pass_at_1(record: Record, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of a record's answers that pass, which is what ``pass@1`` estimates."""
    verdicts = results[0]
    return {"pass@1": sum(verdict == PASSED for verdict in verdicts) / len(verdicts)}


def _verdicts(programs: Sequence[Sequence[str]]) -> list[list[str]]:
    workers = min(16, max(1, len(os.sched_getaffinity(0)) // 2))  # a program takes up to 1 GiB
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda program: run_program(program).verdict, [p for own in programs for p in own])
        return [[next(done) for _ in own] for own in programs]
