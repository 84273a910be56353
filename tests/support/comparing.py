"""Read what runs have left and say how far two of them are apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dsmixer.checkpoint.restore import read_whole

TIMINGS = ("seconds", "tokens_per_second", "peak_memory")
LOSS, GRAD_NORM, WEIGHTS = 1e-5, 1e-4, 0.01
"""What a placement may change in float32, relative; weights by the distance that they have moved."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class RunRecord:
    """A run folder: metrics rows without timings, and paths of the checkpoints."""

    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]

    def column(self, name: str, stage: int | None = None) -> torch.Tensor:
        """One number a step, float64."""
        values = [row[name] for row in self.rows if stage in (None, row["stage"])]
        return torch.tensor(values, dtype=torch.float64)

    def steps(self, stage: int) -> list[int]:
        """Steps with a checkpoint."""
        folder = self.folder / "checkpoints" / f"stage{stage}"
        return sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*"))

    def _checkpoint(self, stage: int, step: int | None) -> Path:
        chosen = self.steps(stage)[-1] if step is None else step
        return self.folder / "checkpoints" / f"stage{stage}" / f"step-{chosen:08d}"

    def tensors(self, stage: int, kind: str = "weights", step: int | None = None) -> Tensors:
        """``weights``, ``exp_avg``, ``exp_avg_sq`` or ``origin`` by name, of the last checkpoint."""
        return read_whole(self._checkpoint(stage, step), kind)

    def live(self) -> Tensors:
        """Experts and routers of the live model at the end, as ``driver_runs.py`` saw them."""
        return load_file(self.folder / "live.safetensors")

    def unit_steps(self, stage: int, step: int | None = None) -> list[int]:
        """Adam's step count of each expert and, last, of the routers."""
        counts: list[int] = json.loads((self._checkpoint(stage, step) / "state.json").read_text())[
            "unit_steps"
        ]
        return counts

    def observed(self) -> dict[str, list[str]]:
        """What ``driver_runs.py`` saw of the live model."""
        facts: dict[str, list[str]] = json.loads((self.folder / "observed.json").read_text())
        return facts


@dataclass(frozen=True)
class Distance:
    """Largest differences between two runs: of losses and gradient norms relative, of weights as a share of
    the distance that the same weights of the reference have moved."""

    loss: float
    grad_norm: float
    weights: float

    def __str__(self) -> str:
        return f"loss {self.loss:.1e} grad_norm {self.grad_norm:.1e} weights {self.weights:.1e}"

    def within(self, loss: float = LOSS, grad_norm: float = GRAD_NORM, weights: float = WEIGHTS) -> bool:
        return self.loss <= loss and self.grad_norm <= grad_norm and self.weights <= weights


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest relative difference of two columns."""
    assert ours.shape == theirs.shape and bool((theirs != 0).all()), (ours.shape, theirs.shape)
    return float(((ours - theirs) / theirs).abs().max())


def moved_share(ours: Tensors, theirs: Tensors, start: Tensors) -> float:
    """Largest ``|ours - theirs| / |theirs - start|`` over the experts (first dimension) of all tensors."""
    assert ours.keys() == theirs.keys() and ours
    worst = 0.0
    for name, their in theirs.items():
        apart_E = (ours[name] - their).flatten(1).norm(dim=1)
        moved_E = (their - start[name]).flatten(1).norm(dim=1)
        assert bool((apart_E[moved_E == 0] == 0).all()), f"{name}: moved where the reference has not"
        shares_E = (apart_E / moved_E)[moved_E > 0]
        worst = max(worst, float(shares_E.max()) if len(shares_E) else 0.0)
    return worst


def distance(run: RunRecord, reference: RunRecord, start: Tensors) -> Distance:
    """How far a run of both stages is from another one.

    Args:
        run: one.
        reference: the other.
        start: experts and routers before stage one.
    """
    pairs = [(row["stage"], row["step"]) for row in reference.rows]
    assert [(row["stage"], row["step"]) for row in run.rows] == pairs and pairs
    shares = []
    before = start
    for stage in sorted({stage for stage, _ in pairs}):
        theirs = reference.tensors(stage)
        shares.append(moved_share(run.tensors(stage), theirs, before))
        before = {**before, **theirs}
    return Distance(
        relative(run.column("loss"), reference.column("loss")),
        relative(run.column("grad_norm"), reference.column("grad_norm")),
        max(shares),
    )


def same_bits(run: RunRecord, other: RunRecord) -> None:
    """Assert that metrics and last checkpoints are equal in every bit."""
    assert run.rows == other.rows
    for stage in (1, 2):
        for kind in ("weights", "exp_avg", "exp_avg_sq", "origin"):
            ours, theirs = run.tensors(stage, kind), other.tensors(stage, kind)
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                assert torch.equal(tensor, theirs[name]), f"stage {stage}: {kind}/{name}"
        assert run.unit_steps(stage) == other.unit_steps(stage)
