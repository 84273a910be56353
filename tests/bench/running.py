"""Measure a case: every system in its own process, their turns in rounds, as many at once as memory holds.

The references and ours are in every group, so that each ratio is of two measured in the same rounds.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.case import Case
from tests.bench.operations import operations
from tests.bench.protocol import Remote, RemoteError
from tests.bench.results import Row
from tests.bench.systems.registry import OURS, REFERENCES, SYSTEMS, bytes_wanted
from tests.bench.timing import in_rounds, ratios, spread

REPOSITORY = Path(__file__).resolve().parents[2]
IN_EVERY_GROUP = ("base", *REFERENCES, OURS)
PRODUCT = "product"
"""The turn of the machine itself."""
STARTING = 300.0
"""Seconds to import everything and run a tiny case."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: turns of each system.
        steps: training steps a turn.
        tokens: decoded tokens a turn.
        patience: seconds of a first step beyond which a system takes no part in the rounds.
        build_limit: seconds to build a system and take its first step.
        memory: share of the free memory that may be filled.
    """

    rounds: int = 5
    steps: int = 3
    tokens: int = 8
    patience: float = 60.0
    build_limit: float = 600.0
    memory: float = 0.8

    def times(self, case: Case) -> int:
        return self.steps if case.what == "train" else self.tokens


@dataclass
class Turns:
    """One system's part in the rounds; when its process ends, the rest of its turns are not numbers.

    Attributes:
        remote: the process.
        message: what it is asked in its turn.
        limit: seconds to answer in.
        problem: why it has ended.
    """

    remote: Remote
    message: Mapping[str, Any]
    limit: float
    problem: str | None = None

    def __call__(self) -> list[float]:
        if self.problem is None:
            try:
                taken: list[float] = self.remote.ask(self.limit, **self.message)["seconds"]
                return taken
            except RemoteError as error:
                self.problem = str(error)
        return [math.nan]


@dataclass
class Bench:
    """The processes.

    Attributes:
        names: systems to measure.
        interpreters: of those that have an environment of their own.
        logs: folder of their standard errors.
        effort: how much is measured.
    """

    names: Sequence[str]
    interpreters: Mapping[str, str]
    logs: Path
    effort: Effort
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _remotes: dict[str, Remote] = field(default_factory=dict)

    def close(self) -> None:
        for remote in self._remotes.values():
            remote.hang_up()
        for remote in self._remotes.values():
            remote.close()
        self._remotes.clear()

    def measure(self, case: Case) -> list[Row]:
        """All systems on one case, as rows in the order of ``names``."""
        names = [name for name in self.names if takes_part(name, case)]
        found: dict[str, Row] = {}
        free = self._remote(self.names[0], case).ask(STARTING, do="memory", device=case.device)["free"]
        free *= self.effort.memory
        for group in groups(names, case, free):
            for row in self._group(group, case):
                found.setdefault(row.system, row)
        for name in names:
            wanted = bytes_wanted(name, case)
            if name not in found:
                problem = f"wants about {wanted / 1e9:.0f} GB, {free / 1e9:.0f} are free"
                found[name] = Row(case, name, problem=problem)
        return [found[name] for name in names]

    def _remote(self, name: str, case: Case) -> Remote:
        """The process of a system, started if it is not there.

        Raises:
            RemoteError: it does not start, or can't do a tiny case.
        """
        if name not in self._remotes:
            remote = self._remotes[name] = self.start(name, case)
            try:
                self.facts[name] = remote.ask(STARTING, do="hello", device=case.device, dtype=case.dtype)
            except RemoteError:
                self._drop(name)
                raise
        return self._remotes[name]

    def start(self, name: str, case: Case) -> Remote:
        """The process of a system, which imports its libraries meanwhile."""
        interpreter = self.interpreters.get(name, sys.executable)
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        command = [interpreter, "-m", "tests.bench.worker", name]
        return Remote(command, self.logs / f"{name}.log", {"PYTHONPATH": path, **environment(case)})

    def _drop(self, name: str) -> None:
        self._remotes.pop(name).close()

    def _group(self, names: Sequence[str], case: Case) -> Iterator[Row]:
        """Build, take turns, give up."""
        first: dict[str, dict[str, Any]] = {}
        turns: dict[str, Turns] = {}
        for name in names:
            try:
                remote = self._remote(name, case)
                first[name] = remote.ask(self.effort.build_limit, do="build", case=case.to_dict())
            except RemoteError as error:
                if name in self._remotes:
                    self._drop(name)
                yield Row(case, name, problem=str(error))
                continue
            message = {"do": "turn", "times": self.effort.times(case)}
            turns[name] = Turns(remote, message, 10 * self.effort.patience)
        patient = {name: turn for name, turn in turns.items() if self._in_time(first[name])}
        if patient:
            product = {"do": "product", "device": case.device, "dtype": case.dtype}
            patient[PRODUCT] = Turns(next(iter(patient.values())).remote, product, STARTING)
        in_rounds(patient, 1)  # once for what a library makes at its second step
        times = in_rounds(patient, self.effort.rounds)
        times |= {name: first[name]["seconds"] for name in turns if name not in patient}
        for name, turn in turns.items():
            if turn.problem is None:
                yield self._row(name, case, times, first[name])
            else:
                self._drop(name)
                yield Row(case, name, problem=turn.problem)

    def _in_time(self, first: Mapping[str, Any]) -> bool:
        return bool(first["seconds"][0] <= self.effort.patience)

    def _row(
        self,
        name: str,
        case: Case,
        times: Mapping[str, list[float]],
        first: Mapping[str, Any],
    ) -> Row:
        """Figures of a system, beside those that took their turns in the same rounds."""
        remote = self._remotes[name]
        peak = remote.ask(60.0, do="peak_bytes")["bytes"]
        remote.ask(60.0, do="free")
        own, reference = times[name], fastest(times)
        product = beside(times[PRODUCT], own) if PRODUCT in times else None
        return Row(
            case,
            name,
            seconds=spread(own),
            to_lora=beside(own, times.get(reference)) if reference else None,
            to_base=beside(own, times.get("base")),
            to_ours=beside(own, times.get(OURS)),
            peak=peak,
            trained=first["trained"],
            loss=first["loss"],
            gradient_norm=first["gradient_norm"],
            tokens_per_second=case.tokens / statistics.median(own),
            share=None if product is None else operations(case, SYSTEMS[name].kind) * product.median,
            matmul=None if product is None else 1 / statistics.median(times[PRODUCT]),
        )


def environment(case: Case) -> dict[str, str]:
    """No system asks the network for anything; on the CPU none finds a GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if case.device == "cpu" else {}
    return {"HF_HUB_OFFLINE": "1", **hidden}


def takes_part(name: str, case: Case) -> bool:
    """Whether a line of its own belongs to a case."""
    system = SYSTEMS[name]
    if case.what == "decode" and not system.decodes:
        return False
    return case.dtype != "float32" or not system.only_16_bit


def fastest(times: Mapping[str, Sequence[float]]) -> str | None:
    """PEFT LoRA in the way that took least, if it was measured."""
    there = [name for name in REFERENCES if name in times and not math.isnan(sum(times[name]))]
    return min(there, key=lambda name: statistics.median(times[name]), default=None)


def beside(own: Sequence[float], other: Sequence[float] | None) -> Any:
    """Ratios of the same rounds; of medians where one took no part in them."""
    if other is None or math.isnan(sum(other)):
        return None
    if len(own) == len(other):
        return ratios(own, other)
    return spread([statistics.median(own) / statistics.median(other)])


def groups(names: Sequence[str], case: Case, free: float) -> list[list[str]]:
    """Systems that fit into memory together, the references in each; what does not fit alone is in none."""
    always = [name for name in names if name in IN_EVERY_GROUP]
    room = free - sum(bytes_wanted(name, case) for name in always)
    found: list[list[str]] = []
    left = 0.0
    for name in names:
        wanted = bytes_wanted(name, case)
        if name in always or wanted > room:
            continue
        if not found or wanted > left:
            found.append(list(always))
            left = room
        found[-1].append(name)
        left -= wanted
    return found or ([always] if room >= 0 else [])
