"""What goes wrong in a rank, at a step that a test can repeat. A fault is a small mapping with a ``kind``."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch

from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training import stage_run
from dsmixer.training.loop import Loop, StepReport
from support.fault_places import prepare_place, tell_fault, time_saves


def prepare(rank: int, fault: Mapping[str, Any]) -> None:
    """Let this rank run into a fault.

    Args:
        rank: of this process.
        fault: ``kind``; the ``rank`` that it concerns; ``stage`` and ``step`` (from 1) before which it comes.
            Kinds: ``signal`` with ``number``; ``raises``, in the data loader; ``hangs``, there; ``nan``, with
            ``to`` a folder where the ranks say what the step changed; ``omit``, the step is not done at all;
            ``points``, see ``kill_at_point``; ``place``, see ``prepare_place``.
    """
    if fault["kind"] == "place":
        if rank == fault["rank"]:
            prepare_place(fault)
        return
    if fault["kind"] == "points":
        if rank in fault["ranks"]:
            told = f"{fault['to']}-{rank}" if "to" in fault else None
            kill_at_point(fault["count"], fault["all"], told)
        return
    kinds: dict[str, type[FaultyLoop]] = {"nan": PoisonedLoop, "omit": OmittingLoop}
    loop = kinds.get(fault["kind"], FaultyLoop)
    loop.fault = fault
    time_saves(stage_run)
    stage_run.Loop = loop  # type: ignore[misc]


class FaultyLoop(Loop):
    """A loop with the fault of this process."""

    fault: ClassVar[Mapping[str, Any]] = {}

    def is_here(self, step: int) -> bool:
        """Whether this is the step (from 0), on any rank."""
        return [self.stage.number, step + 1] == [self.fault["stage"], self.fault["step"]]

    def run_step(self, step: int) -> StepReport:
        if not self.is_here(step) or self.world.rank != self.fault["rank"]:
            return Loop.run_step(self, step)
        tell_fault()
        if self.fault["kind"] == "signal":
            os.kill(os.getpid(), self.fault["number"])
            return Loop.run_step(self, step)
        faults: dict[str, Callable[[int], StepBatch]] = {"raises": raise_there, "hangs": hang_there}
        return Loop.run_step(dataclasses.replace(self, batch_of=faults[self.fault["kind"]]), step)


def raise_there(step: int) -> StepBatch:
    raise OSError(f"the disk with the tokens of step {step + 1} is gone")


def hang_there(step: int) -> StepBatch:
    while True:
        time.sleep(3600)


class PoisonedLoop(FaultyLoop):
    """Loss and gradients of one rank are not numbers in that step; says whether the step changed a bit."""

    poison: ClassVar[bool] = False

    def run_step(self, step: int) -> StepReport:
        PoisonedLoop.poison = self.is_here(step) and self.world.rank == self.fault["rank"]
        if PoisonedLoop.poison:
            tell_fault()
        before = self.held()
        report = Loop.run_step(self, step)
        if self.is_here(step):
            after = self.held()
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            said = {"skipped": report.skipped, "same": same, "tensors": len(before)}
            Path(self.fault["to"], f"rank-{self.world.rank}.json").write_text(json.dumps(said))
        return report

    def _forward_backward(
        self, micro: MicroBatch, statistics: RoutingStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not PoisonedLoop.poison:
            return Loop._forward_backward(self, micro, statistics)
        poisoned = dataclasses.replace(self, world=dataclasses.replace(self.world, size=float("nan")))
        task, routing = Loop._forward_backward(poisoned, micro, statistics)
        return task * float("nan"), routing

    def held(self) -> list[torch.Tensor]:
        """Copies of all that a step may change: partitions, moments, counts, and the weights of the model."""
        optimizer, shards = self.engine.optimizer, self.engine.shards
        moments = [
            optimizer.moments.flat(key, i) for key in ("exp_avg", "exp_avg_sq") for i in range(len(shards))
        ]
        model = [p.detach() for p in self.engine.engine.module.parameters() if p.requires_grad]
        usage = getattr(self.stage, "usage", torch.zeros(0))
        whole = [*(shard.flat() for shard in shards), *moments, optimizer.steps, *model, usage]
        return [tensor.clone() for tensor in whole]


class OmittingLoop(FaultyLoop):
    """The step is not done on any rank: what a skipped one has to come to."""

    def run_step(self, step: int) -> StepReport:
        if not self.is_here(step):
            return Loop.run_step(self, step)
        nothing = dict.fromkeys(("loss", "task_loss", "rsl", "preserve", "grad_norm"), float("nan"))
        rates = dict.fromkeys(("learning_rate", "router_learning_rate"), 0.0)
        counts = {"tokens": 0, "target_tokens": 0, "seconds": 1.0}
        return StepReport(step=step + 1, statistics=None, stop=False, **nothing, **rates, **counts)  # type: ignore[arg-type]


DURABLE = ("fsync", "replace", "rename", "link", "mkdir", "rmdir", "unlink")


def kill_at_point(count: int, whole_job: bool, told: str | None = None) -> None:
    """SIGKILL when this rank has come ``count`` times to a point of a save.

    A point is a call that makes something durable or visible: fsync, rename, mkdir, unlink and the like below
    a folder of checkpoints, and the writing of a file of tensors, of which half is left. So nothing here
    knows how a save is made.

    Args:
        count: of points before it.
        whole_job: whether every rank is killed, rather than this one alone.
        told: a file that holds how many points there were, at the end of the process.
    """
    left = [count]

    def at_point() -> None:
        left[0] -= 1
        if left[0] == 0:
            if whole_job:
                kill_siblings()
            os.kill(os.getpid(), signal.SIGKILL)

    if told is not None:
        atexit.register(lambda: Path(told).write_text(str(count - left[0])))
    for name in DURABLE:
        setattr(os, name, counted(getattr(os, name), at_point))
    halve_tensors(at_point)


def counted(call: Any, at_point: Callable[[], None]) -> Any:
    """A call of ``os`` that counts where it concerns a checkpoint, before it is made."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if "checkpoints" in str(path_of(arguments[0])):
            at_point()
        return call(*arguments, **named)

    return wrapped


def path_of(what: Any) -> Any:
    """The path behind a descriptor, or the path itself."""
    if not isinstance(what, int):
        return what
    try:
        return os.readlink(f"/proc/self/fd/{what}")
    except OSError:
        return ""


def halve_tensors(at_point: Callable[[], None]) -> None:
    """Make the writing of tensors a point, wherever ``save_file`` has been imported to."""
    whole = safetensors.torch.save_file

    def half(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
        whole(tensors, path, *rest, **named)
        size = os.stat(path).st_size
        with open(path, "rb+") as file:
            content = file.read()
            file.truncate(size // 2)
            at_point()
            file.seek(0)
            file.write(content)

    for module in [m for n, m in sys.modules.items() if n.startswith("dsmixer.")]:
        if getattr(module, "save_file", None) is whole:
            module.save_file = half  # type: ignore[attr-defined]


def kill_siblings() -> None:
    """SIGKILL to all other ranks of this job: they write to the same log."""
    for stream in Path("/proc").glob("[0-9]*/fd/1"):
        pid = int(stream.parts[2])
        with contextlib.suppress(OSError):
            if pid != os.getpid() and os.path.samefile(stream, "/proc/self/fd/1"):
                os.kill(pid, signal.SIGKILL)
