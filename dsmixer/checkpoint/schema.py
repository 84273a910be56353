"""What is in a checkpoint folder.

    checkpoints/stage1/step-00000100/
        tensors.safetensors     weights/NAME, exp_avg/NAME, exp_avg_sq/NAME, origin/NAME, usage
        state.json              CheckpointState
        manifest.json           size and sha256 of the other files, written last

NAME is a parameter's name in the model. Tensors are whole and float32, whatever the ranks and ZeRO stage
were. There are no frozen base weights in it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from dsmixer.config.errors import UserError

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT = 1
STEP_PATTERN = re.compile(r"^step-(\d{8,})$")


def step_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class CheckpointState:
    """What is not a tensor.

    Attributes:
        stage: 1 or 2.
        step: optimizer steps done.
        num_steps: of the stage; ``step == num_steps`` is a finished stage.
        unit_steps: Adam's step count of each expert and, last, of the routers.
        cursor: of the sampler.
        versions: of the libraries that wrote it.
        format: of this folder.
    """

    stage: int
    step: int
    num_steps: int
    unit_steps: list[int]
    cursor: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> CheckpointState:
        """Raises ``UserError`` for another format."""
        if values.get("format") != FORMAT or set(values) != {f.name for f in fields(cls)}:
            raise UserError(
                f"checkpoint format {values.get('format')!r}, this version reads {FORMAT}",
                where=where,
                fix="go on with the version of dsmixer that wrote it, or start another run",
            )
        return cls(**values)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: tensors by key, float32 on the CPU."""

    state: CheckpointState
    tensors: dict[str, torch.Tensor]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under ``prefix/``, by parameter name."""
        start = f"{prefix}/"
        return {key[len(start) :]: t for key, t in self.tensors.items() if key.startswith(start)}
