"""Runs that meet a fault, and the table of what came of each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.comparing import RunRecord
from support.fault_places import FAULT_BEGINS, SAVED
from support.forked import Job, RankServer
from support.tiny import write_recipe

SHOWN_CHARACTERS = 230
HEAD = ("fault", "seen", "seconds after it", "codes by rank", "checkpoints left")


@dataclass
class Runs:
    """Runs of one recipe, each by its name.

    Attributes:
        folder: of the recipe; the run folders are in ``runs`` below it.
        server: forks the ranks.
        rows: of the table.
    """

    folder: Path
    server: RankServer
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recipe = write_recipe(self.folder)

    def arguments(self, name: str, *more: str) -> list[str]:
        return ["--config", str(self.recipe), f"run.name={name}", *more]

    def start(self, name: str, *more: str, ranks: int = 2, fault: Mapping[str, Any] | None = None) -> Job:
        return self.server.start(self.arguments(name, *more), ranks=ranks, fault=fault)

    def run(
        self,
        name: str,
        *more: str,
        ranks: int = 2,
        fault: Mapping[str, Any] | None = None,
        as_launcher: bool = False,
    ) -> Job:
        return self.server.wait(self.start(name, *more, ranks=ranks, fault=fault), as_launcher=as_launcher)

    def record(self, name: str) -> RunRecord:
        return RunRecord(self.folder / "runs" / name)

    def step_seconds(self, name: str) -> list[float]:
        """Of the logged steps."""
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [float(json.loads(line)["seconds"]) for line in lines]

    def tell(self, what: str, job: Job, record: RunRecord) -> None:
        """Add a row to the table.

        Args:
            what: went wrong.
            job: that has ended.
            record: of its run folder.
        """
        said = job.lines("dsmixer: ")
        told = next((line for line in said if "error: " in line), said[-1] if said else "nothing")
        seconds = " ".join(f"{seconds:.1f}" for _, seconds in sorted(seconds_after(job).items()))
        codes = " ".join(str(code) for _, code in sorted(job.codes.items()))
        left = [f"stage{stage}/{step}" for stage in (1, 2) for step in record.steps(stage)]
        shown = re.sub(r"/\S*/", "…/", told)
        shown = shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + "…"
        self.rows.append((what, shown, seconds, codes, " ".join(left) or "none"))

    def table(self) -> str:
        """All rows."""
        rows = [HEAD, tuple("---" for _ in HEAD), *self.rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def seconds_after(job: Job) -> dict[int, float]:
    """When each rank has ended, in seconds after the fault began."""
    began = float(job.lines(FAULT_BEGINS)[0].split(FAULT_BEGINS)[1])
    return {rank: job.began + ended - began for rank, ended in job.ended.items()}


def save_seconds(job: Job) -> list[float]:
    """How long the saves of a job took, on each rank."""
    return [float(line.split(SAVED)[1]) for line in job.lines(SAVED)]
