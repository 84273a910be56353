"""The process of one system. Asked over its standard input, it answers on its standard output:

- ``hello``: a tiny case, so that what is loaded only when it is used is there before anything is measured;
- ``build``: a case; its first step is not counted, and told with its loss and the norm of its gradient;
- ``turn``: so many steps or tokens, and what each took;
- ``peak``: bytes since the build;
- ``product``: what an operation of large products takes, in seconds, for each of three;
- ``memory``: bytes that are free;
- ``free``: the case is given up.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from dataclasses import replace
from typing import Any, TextIO

import torch

from tests.bench.case import Case
from tests.bench.peak import PeakMemory, available_bytes
from tests.bench.systems.interface import Built
from tests.bench.systems.registry import SYSTEMS, builder
from tests.bench.timing import seconds

TINY = Case("train", width=128, layers=1, experts=4, rank=8, sequence=16, vocabulary=128)


class Worker:
    """What the process has built, and what it is asked to do with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.case: Case | None = None
        self.built: Built | None = None
        self.peak: PeakMemory | None = None
        self.steps = 0

    def hello(self, device: str, dtype: str) -> dict[str, Any]:
        tiny = replace(TINY, device=device, dtype=dtype)
        self.build(tiny.to_dict())
        self.free()
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if device == "cuda":
            facts["device"] = torch.cuda.get_device_name()
        return facts

    def build(self, case: dict[str, Any]) -> dict[str, Any]:
        self.case, self.steps = Case.from_dict(case), 0
        self.peak = PeakMemory(self.case.device)
        self.built = builder(self.name)(self.case)
        first = self.turn(1)
        self.peak.start()
        return {**first, "trained": self.built.trained}

    def turn(self, times: int) -> dict[str, Any]:
        """Steps or tokens one after the other."""
        assert self.case is not None and self.built is not None
        on_gpu = self.case.device == "cuda"
        threads = 0 if on_gpu else torch.get_num_threads()
        taken, loss, norm = [], None, None
        for _ in range(times):
            if self.case.what == "decode":
                taken.append(seconds(self.built.decode_token, threads, _finish(on_gpu)))
            else:
                step = Step(self.built, self.steps)
                taken.append(seconds(step, threads, _finish(on_gpu)))
                loss, norm = step.found
            self.steps += 1
        return {"seconds": taken, "loss": loss, "gradient_norm": norm}

    def peak_bytes(self) -> dict[str, Any]:
        assert self.peak is not None
        return {"bytes": self.peak.num_bytes()}

    def product(self, device: str, dtype: str) -> dict[str, Any]:
        """What there is to be had, in the dtype that the base computes in."""
        size = 16384 if device == "cuda" else 2048
        kind = torch.float32 if dtype == "float32" else torch.bfloat16
        a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        on_gpu = device == "cuda"
        work = functools.partial(torch.mm, a, b)
        threads = 0 if on_gpu else torch.get_num_threads()
        work()
        return {"seconds": [seconds(work, threads, _finish(on_gpu)) / (2 * size**3) for _ in range(3)]}

    def memory(self, device: str) -> dict[str, Any]:
        return {"free": torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()}

    def free(self) -> dict[str, Any]:
        if self.built is not None:
            self.built.close()
        self.built = self.case = self.peak = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}


class Step:
    """One training step, and what it found."""

    def __init__(self, built: Built, number: int) -> None:
        self.built, self.number = built, number
        self.found: tuple[float, float] = (0.0, 0.0)

    def __call__(self) -> None:
        self.found = self.built.train_step(self.number)


def _finish(on_gpu: bool) -> Any:
    return torch.cuda.synchronize if on_gpu else None


def serve(worker: Worker, asked: TextIO, answers: TextIO) -> None:
    """Answer until the other side hangs up."""
    for line in asked:
        message = json.loads(line)
        answer = getattr(worker, message.pop("do"))(**message)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Keep standard output for the answers: libraries that print go to standard error."""
    (name,) = sys.argv[1:]
    assert name in SYSTEMS, f"{name}: not one of {', '.join(SYSTEMS)}"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.manual_seed(0)
    serve(Worker(name), sys.stdin, answers)
    sys.stderr.flush()
    os._exit(0)  # nothing is left to save; libraries take seconds to say good-bye


if __name__ == "__main__":
    main()
