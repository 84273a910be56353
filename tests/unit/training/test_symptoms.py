"""Warnings of a run that goes wrong with finite numbers."""

from __future__ import annotations

import math

import pytest
import torch

from dsmixer.config.schema import HealthConfig
from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training.loop import StepReport
from dsmixer.training.nonfinite import NonFiniteError, NonFinitePolicy, StepNumbers, vote
from dsmixer.training.symptoms import MOST_WARNINGS, WINDOW, Symptoms
from dsmixer.training.world import World

EXPERTS, ROUTERS = ["law", "chess", "code"], ["layer 0", "layer 1"]


def report(step: int, loss: float = 2.0, counts: list[list[float]] | None = None) -> StepReport:
    """A step; ``counts`` are the first choices of each router and expert."""
    statistics, chosen_E = None, None
    if counts is not None:
        statistics = RoutingStatistics(num_routers=len(ROUTERS), num_experts=len(EXPERTS))
        statistics.top1_ME.copy_(torch.tensor(counts))
        chosen_E = torch.tensor(counts).sum(0)
    numbers = dict.fromkeys(("task_loss", "rsl", "preserve", "learning_rate", "router_learning_rate"), 0.0)
    return StepReport(
        step=step,
        loss=loss,
        grad_norm=1.0,
        tokens=1,
        target_tokens=1,
        seconds=1.0,
        statistics=statistics,
        stop=False,
        chosen_E=chosen_E,
        **numbers,
    )


def symptoms(**health: object) -> Symptoms:
    return Symptoms(HealthConfig(**{"dead_after": 10, **health}), EXPERTS, ROUTERS)  # type: ignore[arg-type]


def wavering(step: int) -> float:
    return 2.0 + 0.1 * math.sin(step)


def test_a_spike_is_told_and_ordinary_noise_is_not() -> None:
    watch = symptoms()
    told = [text for step in range(1, 300) for text in watch.look(report(step, wavering(step)))]
    assert told == []
    assert watch.look(report(300, 2.7)) == []  # nine deviations, yet less than half more
    (line,) = watch.look(report(301, 4.0))
    assert line.startswith("the loss of step 301 is 4.0000, and the 50 steps before had 2.0")


def test_the_first_steps_are_no_spike_and_the_warnings_are_bounded() -> None:
    watch = symptoms()
    assert [t for step in range(1, WINDOW) for t in watch.look(report(step, 100.0 / step))] == []
    told = []
    for step in range(WINDOW, WINDOW + 2000):
        told += watch.look(report(step, 9.0 if step % 60 == 0 else wavering(step)))
    assert len(told) == MOST_WARNINGS and told[-1].endswith("this is not told again")


def test_an_expert_without_a_token_is_told_once_until_it_comes_back() -> None:
    watch = symptoms()
    without, within = [[5.0, 5.0, 0.0]] * 2, [[4.0, 4.0, 2.0]] * 2
    told = {step: texts for step in range(1, 31) if (texts := watch.look(report(step, counts=without)))}
    assert told == {10: ["no token has been routed to code in the last 10 steps"]}
    assert watch.look(report(31, counts=within)) == []
    again = [texts for step in range(32, 42) if (texts := watch.look(report(step, counts=without)))]
    assert len(again) == 1


def test_a_router_that_gives_nearly_all_to_one_expert_is_told() -> None:
    watch = symptoms()
    counts = [[98.0, 1.0, 1.0], [40.0, 30.0, 30.0]]
    told = [text for step in range(1, 11) for text in watch.look(report(step, counts=counts))]
    assert len(told) == 1 and told[0].endswith("go to one expert in layer 0 (law 98%)")


def test_warnings_can_be_turned_off() -> None:
    watch = symptoms(warnings=False)
    assert not [t for step in range(1, 200) for t in watch.look(report(step, float(step**3)))]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"task_loss": math.nan}, ["the loss of this step is nan"]),
        ({"rsl": math.inf}, ["the routing loss of this step is inf"]),
        (
            {"squared_norms_U": torch.tensor([1.0, math.inf, 1.0, math.nan])},
            ["the gradient is not finite for chess, the routers"],
        ),
    ],
)
def test_what_is_not_finite_is_named(change: dict[str, object], told: list[str]) -> None:
    numbers = {
        "task_loss": 1.0,
        "rsl": 0.0,
        "preserve": 0.0,
        "squared_norms_U": torch.ones(4),
    }
    assert StepNumbers(**{**numbers, **change}).problems(EXPERTS, ROUTERS) == told  # type: ignore[arg-type]


def test_steps_are_skipped_as_often_as_allowed_and_then_stop_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    world, policy = World(0, 1, torch.device("cpu")), NonFinitePolicy(skip=True, max_skipped=2)
    seen = [("law a.jsonl:3", torch.tensor(1.0)), ("chess b.jsonl:9", torch.tensor(math.nan))]
    assert not vote(world, [], seen, policy, "step 1 of stage 1")
    for step in (2, 3):
        assert vote(world, ["the loss of this step is nan"], seen, policy, f"step {step} of stage 1")
    with pytest.raises(NonFiniteError, match="2 such steps of the run were skipped before"):
        vote(world, ["the loss of this step is nan"], seen, policy, "step 4 of stage 1")
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in said] == [" warning", " warning", " error"]
    assert all("the micro-batches with it held chess b.jsonl:9" in line for line in said)
    with pytest.raises(
        NonFiniteError, match="every micro-batch's loss is finite, the largest with law a.jsonl:3"
    ):
        vote(world, ["the gradient is not finite for law"], seen[:1], NonFinitePolicy(), "step 5 of stage 1")


def test_a_router_whose_logits_are_not_finite_is_named() -> None:
    statistics = RoutingStatistics(num_routers=2, num_experts=3)
    statistics.p_ME[1, 2] = math.nan
    told = "logits are not finite in the routers layer 1"
    numbers = fetched([1.0, math.nan, 0.0], statistics)
    assert numbers.problems(EXPERTS, ROUTERS)[-1] == told
    alone = fetched([1.0, 0.0, 0.0], statistics)
    assert alone.problems(EXPERTS, ROUTERS) == [told], "a reason by itself"


def fetched(losses: list[float], statistics: RoutingStatistics | None) -> StepNumbers:
    return StepNumbers.fetch(torch.tensor(losses), 1, torch.ones(5), statistics)


def test_what_travels_as_one_tensor_arrives_as_it_was() -> None:
    """Numbers that no two kinds share."""
    statistics = RoutingStatistics(num_routers=2, num_experts=3)
    statistics.chosen_ME.copy_(torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0**24]]))
    statistics.entropy_M[0] = math.inf
    losses, sums = torch.tensor([7.5, 0.1, 1.0]), torch.tensor([0.25, 0.5, 0.75, 1.25, -3.0])
    numbers = StepNumbers.fetch(losses, 5, sums, statistics)
    assert (numbers.task_loss, numbers.rsl, numbers.preserve) == (1.5, losses[1].item(), -3.0)
    assert numbers.squared_norms_U.tolist() == [0.25, 0.5, 0.75, 1.25] and numbers.stop is True
    assert numbers.finite_M is not None and numbers.finite_M.tolist() == [False, True]
    assert numbers.chosen_E is not None and numbers.chosen_E.tolist() == [4.0, 0.0, 2.0**24 + 2.0]
    alone = StepNumbers.fetch(torch.zeros(3), 5, sums, None)
    assert (alone.finite_M, alone.chosen_E, alone.stop) == (None, None, False)
