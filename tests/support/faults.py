"""Real signals at a chosen step: what happens to a run from outside, at a moment that a test can repeat."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

from dsmixer.checkpoint import parts
from dsmixer.training import stage_run
from dsmixer.training.loop import Loop, StepReport


def signal_before(loop: type[Loop], pending: list[list[int]], number: signal.Signals) -> type[Loop]:
    """A loop whose last rank gets the signal before the first pending (stage, step)."""

    class Signalled(loop):  # type: ignore[misc,valid-type]
        def run_step(self, step: int) -> StepReport:
            if pending and pending[0] == [self.stage.number, step + 1]:
                pending.pop(0)
                if self.world.rank == self.world.size - 1:
                    os.kill(os.getpid(), number)
            report: StepReport = super().run_step(step)
            return report

    return Signalled


def interrupt_steps(pending: list[list[int]], number: signal.Signals, loop: type[Loop] = Loop) -> None:
    """Let stages run with ``signal_before``."""
    stage_run.Loop = signal_before(loop, pending, number)  # type: ignore[misc]


def kill_while_saving(stage: int, step: int) -> None:
    """SIGKILL to the rank that calls this, when half of its tensors of this step's checkpoint are written."""
    whole_save = parts.save_file

    def half_save(tensors: Any, path: Path) -> None:
        whole_save(tensors, path)
        if f"stage{stage}" in path.parts and path.parent.name.endswith(f"{step:08d}"):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    parts.save_file = half_save


FEW_BYTES = 4096


def limit_files(num_bytes: int | None) -> None:
    """Let no file of this process grow beyond so many bytes: the system then refuses the writing, as it does
    on a full disk. None: as large as it likes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if num_bytes is None else num_bytes, hard))
