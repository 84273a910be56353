"""Which rows an optimizer step takes as one tensor."""

from __future__ import annotations

import torch

from dsmixer.training.rows import Rows
from dsmixer.training.updates import StepOfUnits


def step_of(steps: list[int], clip: list[float]) -> StepOfUnits:
    steps_U, clip_U = torch.tensor(steps), torch.tensor(clip)
    return StepOfUnits(steps_U, steps_U.float(), clip_U, clip_U < 1, [0.1] * len(steps))


def rows_at(units_X: torch.Tensor, *places: int) -> Rows:
    indices = torch.tensor(places)
    return Rows(indices, units_X[indices], places)


def test_neighbours_of_equally_many_steps_are_one_run() -> None:
    of_units = step_of([3, 3, 5, 5, 5, 3], [1.0] * 6)
    units_X = torch.arange(6)
    runs = of_units.runs_of(units_X, rows_at(units_X, 0, 1, 2, 4, 5))
    assert [(run.places, run.taken) for run in runs] == [
        (slice(0, 2), slice(0, 2)),
        (slice(2, 3), slice(2, 3)),
        (slice(4, 5), slice(3, 4)),  # the row before it was not reached
        (slice(5, 6), slice(4, 5)),
    ]
    assert [float(run.step) for run in runs] == [3, 5, 5, 3]
    assert all(run.clip_N1 is None for run in runs)


def test_a_run_clips_each_row_by_its_own_unit() -> None:
    of_units = step_of([1, 1, 1], [1.0, 0.5, 0.25])
    units_X = torch.tensor([2, 0, 1])
    (run,) = of_units.runs_of(units_X, rows_at(units_X, 0, 1, 2))
    assert run.clip_N1 is not None and run.clip_N1.tolist() == [[0.25], [1.0], [0.5]]
    units_X = torch.tensor([0, 0])
    (run,) = of_units.runs_of(units_X, rows_at(units_X, 0, 1))
    assert run.clip_N1 is None
