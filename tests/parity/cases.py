"""The runs that the parity tests compare, by name. All runs of one world size share a launch.

``wWzZ`` is the plain run on W ranks with ZeRO Z; the others say in what they differ from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LONG = os.environ.get("DSMIXER_LONG") == "1"
"""Whether the whole matrix runs: minutes more, by hand."""

COPIES = 8
IDLE_EXPERTS = [f"{domain}{i}" for domain in ("sums", "words", "rare") for i in range(COPIES)]


@dataclass(frozen=True)
class Case:
    """One run: see ``driver_runs.py``. ``commands``: the stages of each call of ``train``, one after another.
    ``kind``: ``llama``, ``gpt2``, or ``llama24`` with 24 domains and experts."""

    name: str
    ranks: int
    overrides: tuple[str, ...]
    kind: str = "llama"
    commands: tuple[tuple[int, ...], ...] = ((1, 2),)
    options: dict[str, Any] = field(default_factory=dict)


def both(**values: object) -> tuple[str, ...]:
    """An override of both stages."""
    return tuple(f"{stage}.{k}={v}" for k, v in values.items() for stage in ("stage1", "stage2"))


def zero(stage: int) -> str:
    return f"deepspeed.zero_stage={stage}"


EVERY_STEP = ("checkpoint.every=1", "checkpoint.keep=100")
UNPACKED = "data.packing=false"
ONE_STEP = both(max_steps="null", epochs=1, global_batch_size=64)
DROPOUT = "mixer.dropout=0.2"
CHECKPOINTED = "base.activation_checkpointing=true"
IDLE = (
    *EVERY_STEP,
    UNPACKED,
    "mixer.targets=[q]",
    "stage2.top_k=1",
    "stage2.renormalize=false",
    "stage2.global_batch_size=2",
    "stage2.max_steps=8",
)
HARD_ORACLE = (
    *EVERY_STEP,
    "stage2.enabled=false",
    "stage1.global_batch_size=4",
    "stage1.max_steps=8",
    "stage1.clip=1.3",
)
SOFT_ORACLE = (*EVERY_STEP, "stage2.router_learning_rate=0.01", "stage2.preserve.experts=[sums, rare]")


def _short() -> Iterator[Case]:
    for ranks in (1, 2):
        for stage in range(4):
            yield Case(f"w{ranks}z{stage}", ranks, (zero(stage),))
    four = (zero(1), UNPACKED)
    yield Case("four_times_one", 1, (*four, *both(global_batch_size=4, micro_batch_size=1)))
    yield Case("one_times_four", 1, (*four, *both(global_batch_size=4, micro_batch_size=4)))
    yield Case("packed", 2, (zero(2), *ONE_STEP))
    yield Case("unpacked", 2, (zero(2), *ONE_STEP, UNPACKED))
    for stage in (0, 3):
        yield Case(f"checkpointed_z{stage}", 2, (zero(stage), CHECKPOINTED))
    yield Case("dropout_z2", 2, (zero(2), DROPOUT))
    yield Case("checkpointed_dropout_z2", 2, (zero(2), DROPOUT, CHECKPOINTED))
    for stage in (2, 3):
        yield Case(f"two_commands_z{stage}", 2, (zero(stage),), commands=((1,), (2,)))
        yield Case(f"bf16_z{stage}", 2, (zero(stage), "base.dtype=bfloat16"))
        yield Case(f"idle_z{stage}", 2, (zero(stage), *IDLE), kind="llama24")
    yield Case("frozen_z3", 2, (zero(3), "stage2.experts=frozen"))
    yield Case("stopped_z3", 2, (zero(3),), options={"stop_at": [[1, 2], [2, 5]]})
    for fault in ("no_world", "local_counts"):
        yield Case(f"fault_{fault}", 2, (zero(2),), options={"fault": fault})
    yield Case("hard_oracle", 2, (zero(2), *HARD_ORACLE))
    yield Case("hard_oracle_gpt2", 2, (zero(1), *HARD_ORACLE), kind="gpt2", commands=((1,),))
    yield Case("soft_oracle", 2, (zero(2), *SOFT_ORACLE))


ROUTINGS = {
    "soft": ("stage2.routing=soft",),
    "hard_soft": ("stage2.routing=hard_soft",),
    "top_p": ("stage2.routing=top_p", "stage2.top_p=0.6"),
    "per_block": ("mixer.router=per_block",),
    "smooth": ("stage2.rsl.usage=smooth",),
    "loop": ("mixer.compute=loop",),
    "grouped": ("mixer.compute=grouped",),
}


def _long() -> Iterator[Case]:
    for ranks in (1, 2, 4):
        for stage in range(4):
            yield Case(f"gpt2_w{ranks}z{stage}", ranks, (zero(stage),), kind="gpt2")
    for stage in range(4):
        yield Case(f"w4z{stage}", 4, (zero(stage),))
    for name, overrides in ROUTINGS.items():
        yield Case(f"{name}_w1z0", 1, (zero(0), *overrides))
        for stage in (2, 3):
            yield Case(f"{name}_w2z{stage}", 2, (zero(stage), *overrides))
    for stage in (0, 1, 2):
        yield Case(f"stopped_z{stage}", 2, (zero(stage),), options={"stop_at": [[1, 2], [2, 5]]})
    for stage in (0, 1):
        yield Case(f"idle_z{stage}", 2, (zero(stage), *IDLE), kind="llama24")
        yield Case(f"bf16_z{stage}", 2, (zero(stage), "base.dtype=bfloat16"))
        yield Case(f"two_commands_z{stage}", 2, (zero(stage),), commands=((1,), (2,)))
    for stage in (0, 3):
        yield Case(f"hard_oracle_z{stage}", 2, (zero(stage), *HARD_ORACLE))
        yield Case(f"soft_oracle_z{stage}", 2, (zero(stage), *SOFT_ORACLE))
    for stage in (0, 2):
        yield Case(f"frozen_z{stage}", 2, (zero(stage), "stage2.experts=frozen"))


def all_cases() -> list[Case]:
    """Those of this call of pytest."""
    return [*_short(), *(_long() if LONG else ())]


def names(prefix: str) -> list[str]:
    """Names of the cases that begin so, for parametrisation."""
    return [case.name for case in all_cases() if case.name.startswith(prefix)]
