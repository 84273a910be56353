"""Where experts live and what each rank holds: arithmetic alone, no torch.distributed.

This version places every expert on every rank (``replicate``) or shards the stacked bank with ZeRO-3
(``weights``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FLOAT32 = 4


@dataclass(frozen=True)
class ModelSize:
    """Weights of a model with mixers.

    Attributes:
        base: frozen weights.
        experts: weights of all experts, padded rows included.
        routers: weights of all routers.
        base_bytes: bytes of one frozen weight.
    """

    base: int
    experts: int
    routers: int
    base_bytes: int


@dataclass(frozen=True)
class Plan:
    """A placement and what it predicts.

    Attributes:
        mode: ``replicate`` or ``weights``.
        zero_stage: 0 to 3.
        world_size: W.
        expert_parallel_size: EP; 1 here.
        reason: why this mode.
        bytes_per_rank: by stage and kind: base, trained weights, ZeRO's float32 copy, gradients, moments.
    """

    mode: str
    zero_stage: int
    world_size: int
    expert_parallel_size: int
    reason: str
    bytes_per_rank: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    size: ModelSize, *, mode: str, zero_stage: int, world_size: int, trained: dict[str, int]
) -> Plan:
    """The plan for one run.

    Args:
        size: of model and mixers.
        mode: of the recipe: ``auto``, ``replicate`` or ``weights``.
        zero_stage: resolved.
        world_size: W.
        trained: weights that train in each enabled stage, by its name.
    """
    chosen = "weights" if zero_stage == 3 else "replicate"
    asked = "as the recipe says" if mode != "auto" else f"ZeRO stage {zero_stage} goes with it"
    return Plan(
        mode=chosen,
        zero_stage=zero_stage,
        world_size=world_size,
        expert_parallel_size=1,
        reason=asked,
        bytes_per_rank={
            stage: _bytes(size, weights, zero_stage, world_size) for stage, weights in trained.items()
        },
    )


def _bytes(size: ModelSize, trained: int, zero_stage: int, world_size: int) -> dict[str, int]:
    share = -(-trained // world_size)
    held = -(-(size.experts + size.routers) // world_size) if zero_stage == 3 else size.experts + size.routers
    base = -(-size.base // world_size) if zero_stage == 3 else size.base
    return {
        "base": base * size.base_bytes,
        "experts_and_routers": held * FLOAT32,
        "float32_copy": share * FLOAT32 if zero_stage in (1, 2) else 0,
        "gradients": (share if zero_stage >= 2 else trained) * FLOAT32,
        "moments": 2 * (trained if zero_stage == 0 else share) * FLOAT32,
    }
