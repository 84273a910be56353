"""Steps whose loss, gradient or routers are not finite: all ranks skip them together, or stop together."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training.world import World, gather_objects

SHOWN, SHOWN_EXAMPLES = 8, 4


class NonFiniteError(RuntimeError):
    """A loss or a gradient was infinite or not a number; nothing was updated with it. Rank 0 has said it."""


@dataclass
class NonFinitePolicy:
    """What becomes of such steps.

    Attributes:
        skip: whether they are passed over.
        max_skipped: how many are; one more stops the run.
        skipped: how many were, the same on every rank.
    """

    skip: bool = False
    max_skipped: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class StepNumbers:
    """What is looked at before a step, all of it the same on every rank: each is a sum over the ranks.

    Attributes:
        task_loss, rsl, preserve: losses of the step.
        squared_norms_U: squared gradient norms of experts, and of the routers.
        statistics: of the routers, None in stage one.
    """

    task_loss: float
    rsl: float
    preserve: float
    squared_norms_U: torch.Tensor
    statistics: RoutingStatistics | None

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
        if found and self.statistics is not None:
            bad_M = ~torch.isfinite(self.statistics.buffer).all(dim=1)
            routers = [router_names[i] for i in bad_M.nonzero().flatten().tolist()]
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
    too_many = f" {policy.skipped} such steps were skipped before." if policy.skip else ""
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
        print(f"dsmixer: {text}", file=sys.stderr, flush=True)
