"""Steps whose loss, gradient or routers are not finite: all ranks skip them together, or stop together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmixer.checkpoint.schema import step_of
from dsmixer.config.schema import HealthConfig
from dsmixer.report.run_folder import METRICS_FILE, read_metrics
from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training.checkpoints import Checkpoints
from dsmixer.training.rows import to_device
from dsmixer.training.telling import tell_problem
from dsmixer.training.world import World, gather_objects, once

SHOWN, SHOWN_EXAMPLES = 8, 4


class NonFiniteError(RuntimeError):
    """A loss or a gradient was infinite or not a number; nothing was updated with it. Rank 0 has said it."""


@dataclass
class NonFinitePolicy:
    """What becomes of such steps.

    Attributes:
        skip: whether they are passed over.
        max_skipped: how many are; one more stops the run.
        skipped: how many of the run were, by this start and those before it, the same on every rank.
    """

    skip: bool = False
    max_skipped: int = 0
    skipped: int = 0


def nonfinite_policy(health: HealthConfig, checkpoints: Checkpoints) -> NonFinitePolicy:
    """The policy of a start, which goes on counting where the checkpoint stands that it goes on from: a run
    that is started again and again skips no more steps than one that is not. A collective."""
    policy = NonFinitePolicy(health.on_nonfinite == "skip", health.max_skipped)
    newest = checkpoints.newest(2) or checkpoints.newest(1) if policy.skip else None
    if newest is not None:
        last = (int(newest.parent.name.removeprefix("stage")), step_of(newest.name))
        metrics = checkpoints.folder.path / METRICS_FILE
        policy.skipped = once(checkpoints.world, lambda: _skipped_until(metrics, last))
    return policy


def _skipped_until(metrics: Path, last: tuple[int, int]) -> int:
    rows = read_metrics(metrics)
    return sum(row.get("skipped", 0) for row in rows if (row["stage"], row["step"]) <= last)


@dataclass(frozen=True)
class StepNumbers:
    """What the host looks at before a step, all of it the same on every rank: each is a sum over the ranks.

    Attributes:
        task_loss, rsl, preserve: losses of the step.
        squared_norms_U: squared gradient norms of experts, and of the routers.
        finite_M: whether all statistics of a router are finite, None in stage one.
        chosen_E: how often an expert was chosen, over all routers, None in stage one.
        stop: whether some rank was asked to stop.
    """

    task_loss: float
    rsl: float
    preserve: float
    squared_norms_U: torch.Tensor
    finite_M: torch.Tensor | None = None
    chosen_E: torch.Tensor | None = None
    stop: bool = False

    @classmethod
    def fetch(
        cls, losses: torch.Tensor, num_targets: int, sums: torch.Tensor, statistics: RoutingStatistics | None
    ) -> StepNumbers:
        """Bring all of it to the host in one transfer, for which the host waits.

        Every number is a float32 already, so nothing is lost in a tensor of them.

        Args:
            losses: sums of cross-entropy, routing loss and requests to stop, ``[3]`` on the device.
            num_targets: target tokens of the step.
            sums: squared norms and, last, the preserve term, ``[U + 1]`` on the optimizer's device.
            statistics: of the routers, None in stage one.
        """
        parts = [losses, to_device(sums, losses.device)]
        if statistics is not None:
            finite = torch.isfinite(statistics.buffer).all(dim=1)
            parts += [finite.to(losses.dtype), statistics.chosen_ME.sum(0)]
        on_host = torch.cat(parts).cpu().split([len(part) for part in parts])
        task_sum, rsl, stop = on_host[0].tolist()
        of_routers = on_host[2:]
        return cls(
            task_loss=task_sum / num_targets,
            rsl=rsl,
            preserve=float(on_host[1][-1]),
            squared_norms_U=on_host[1][:-1],
            finite_M=of_routers[0] > 0 if of_routers else None,
            chosen_E=of_routers[1] if of_routers else None,
            stop=stop > 0,
        )

    def problems(self, expert_names: Sequence[str], router_names: Sequence[str]) -> list[str]:
        """What is not finite, each in words; nothing where all is well."""
        losses = {"loss": self.task_loss, "routing loss": self.rsl, "preserve term": self.preserve}
        found = [
            f"the {name} of this step is {value}"
            for name, value in losses.items()
            if not math.isfinite(value)
        ]
        units = [*expert_names, "the routers"]
        bad = [units[i] for i in (~torch.isfinite(self.squared_norms_U)).nonzero().flatten().tolist()]
        if bad:
            found.append(f"the gradient is not finite for {_listed(bad)}")
        if self.finite_M is not None:
            routers = [router_names[i] for i in (~self.finite_M).nonzero().flatten().tolist()]
            found += [f"logits are not finite in the routers {_listed(routers)}"] if routers else []
        return found


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def vote(
    world: World,
    problems: Sequence[str],
    micro_batches: list[tuple[str, torch.Tensor]],
    policy: NonFinitePolicy,
    place: str,
) -> bool:
    """Whether a step is to be skipped; all ranks answer alike, for they look at the same sums.

    Args:
        world: the ranks.
        problems: of the step, as ``StepNumbers.problems``; none: it is not skipped.
        micro_batches: description and summed loss of each micro-batch of this rank.
        policy: what to do; counts what is skipped.
        place: ``step 5 of stage 1``.

    Raises:
        NonFiniteError: on every rank, after rank 0 has named experts, domains and examples.
    """
    if not problems:
        return False
    text = f"{place}: {', '.join([*problems, *_examples(world, micro_batches)])}"
    if policy.skip and policy.skipped < policy.max_skipped:
        policy.skipped += 1
        _say(
            world, f"warning: {text}. The step is skipped ({policy.skipped} of at most {policy.max_skipped})"
        )
        return True
    too_many = f" {policy.skipped} such steps of the run were skipped before." if policy.skip else ""
    error = (
        f"{text}. Nothing was updated.{too_many} Look at those examples, lower the learning rate, or use "
        "base.dtype=float32; the last checkpoint is intact"
    )
    _say(world, f"error: {error}")
    gather_objects(world, None)  # rank 0 has spoken before any rank leaves
    raise NonFiniteError(error)


def _examples(world: World, micro_batches: list[tuple[str, torch.Tensor]]) -> list[str]:
    """The micro-batches whose loss is not finite; where all are, the one of the largest loss."""
    own = [text for text, loss in micro_batches if not bool(torch.isfinite(loss))]
    largest = max(((float(loss), text) for text, loss in micro_batches), default=(0.0, ""))
    gathered = gather_objects(world, (own, largest))
    examples = [text for texts, _ in gathered for text in texts]
    if examples:
        more = len(examples) - SHOWN_EXAMPLES
        listed = "; ".join(examples[:SHOWN_EXAMPLES]) + (f"; and {more} more" if more > 0 else "")
        return [f"the micro-batches with it held {listed}"]
    return [f"every micro-batch's loss is finite, the largest with {max(top for _, top in gathered)[1]}"]


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        tell_problem(text)
