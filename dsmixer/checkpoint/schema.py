"""What is in a checkpoint folder.

    checkpoints/stage1/step-00000100/
        rank-00000-000.safetensors  KIND/NAME, flat: what rank 0 holds of that parameter; bounded in size
        rank-00000.json             where in these files which elements of which expert are
        ...                         as many as the ranks that saved, and their files
        state.json                  CheckpointState
        config.yaml                 the configuration under which it was saved
        manifest.json               size and sha256 of all other files, written last

KIND is one of ``KINDS``, NAME a parameter's name in the model. Experts are known by their names. All numbers
are float32, and nothing in the folder depends on the ranks and the ZeRO stage that it will be read with.
There are no frozen base weights in it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from dsmixer.config.errors import UserError

STATE, CONFIG, MANIFEST = "state.json", "config.yaml", "manifest.json"
FORMAT = 2
ADDED = {"base"}
"""Of ``CheckpointState``: what checkpoints of this format did not have from the beginning."""
KINDS = ("weights", "exp_avg", "exp_avg_sq", "origin")
STEP_PATTERN = re.compile(r"^step-(\d{8,})$")


def step_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The way back."""
    return int(name.split("-")[1])


def part_name(rank: int, number: int) -> str:
    """The ``number``-th file of tensors of a rank."""
    return f"rank-{rank:05d}-{number:03d}.safetensors"


def index_name(rank: int) -> str:
    """The list of what a rank's files hold."""
    return f"rank-{rank:05d}.json"


@dataclass(frozen=True)
class CheckpointState:
    """What is not a tensor.

    Attributes:
        stage: 1 or 2.
        step: optimizer steps done.
        num_steps: of the stage; ``step == num_steps`` is a finished stage.
        experts: names of the pool, in order.
        ranks: LoRA rank of each; a bank is as high as the highest, rounded up.
        shapes: whole shape of each parameter that is saved, by name.
        unit_steps: Adam's step count of each expert and, last, of the routers.
        cursor: of the sampler.
        rows: global batch in rows of each enabled stage of the run, by its name.
        loss: mean of the steps since the checkpoint before, in nats; what ``checkpoint.keep_best`` goes by.
        layout: ranks, ZeRO stage and EP that saved it: for messages, nothing depends on it.
        versions: of the libraries that wrote it.
        base: digests of the base that it was trained on; None where they were not kept.
        format: of this folder.
    """

    stage: int
    step: int
    num_steps: int
    experts: list[str]
    ranks: list[int]
    shapes: dict[str, list[int]]
    unit_steps: list[int]
    cursor: dict[str, Any]
    rows: dict[str, int]
    loss: float | None
    layout: dict[str, int]
    versions: dict[str, str]
    base: dict[str, str] | None = None
    format: int = FORMAT

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> CheckpointState:
        """Raises ``UserError`` for another format."""
        names = {f.name for f in fields(cls)}
        if values.get("format") != FORMAT or not names - ADDED <= set(values) <= names:
            raise other_format(values.get("format"), where)
        return cls(**values)


def other_format(found: object, where: str) -> UserError:
    """A checkpoint of another version of dsmixer: not damaged, and not readable here."""
    return UserError(
        f"checkpoint format {found!r}, this version reads {FORMAT}",
        where=where,
        fix="go on with the version of dsmixer that wrote it, or start another run",
    )
