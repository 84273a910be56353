"""One small round of the bench with every system in this process, so that libraries are imported once.

Prints a line of JSON for each row.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from tests.bench.case import Case
from tests.bench.running import Bench, Effort
from tests.bench.worker import Worker

NAMES = ("base", "lora", "loop", "stage_one", "stage_two")
TRAIN = Case(
    "train", width=128, layers=1, experts=4, rank=8, sequence=32, vocabulary=128, top_k=3, domains_a_row=1
)
DECODE = Case("decode", width=128, layers=1, experts=4, rank=8, sequence=16, vocabulary=128)


class Here:
    """A worker that is asked as its process would be; what is not about systems is given."""

    GIVEN: ClassVar[dict[str, dict[str, Any]]] = {
        "hello": {},
        "memory": {"free": 1e10},
        "product": {"seconds": [1e-11]},
    }

    def __init__(self, name: str) -> None:
        self.worker = Worker(name)

    def ask(self, limit: float, **message: Any) -> dict[str, Any]:
        message = json.loads(json.dumps(message))
        asked = message.pop("do")
        if asked in self.GIVEN:
            return self.GIVEN[asked]
        answer: dict[str, Any] = json.loads(json.dumps(getattr(self.worker, asked)(**message)))
        return answer

    def hang_up(self) -> None:
        pass

    def close(self) -> None:
        pass


class InOneProcess(Bench):
    def start(self, name: str, case: Case) -> Any:
        return Here(name)


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr
    bench = InOneProcess(NAMES, {}, Path(), Effort(rounds=2, steps=1, tokens=2))
    for case in (TRAIN, DECODE):
        for row in bench.measure(case):
            answers.write(json.dumps(asdict(row)) + "\n")
    answers.flush()
    os._exit(0)  # libraries take seconds to say good-bye


if __name__ == "__main__":
    main()
