"""The systems, and how much memory each is expected to want: a line each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.bench.case import BYTES, Case

if TYPE_CHECKING:
    from tests.bench.systems.interface import Built


@dataclass(frozen=True)
class System:
    """A line of the table.

    Attributes:
        title: as it is printed.
        where: module and function that builds it.
        kind: whose model operations it has, see ``operations``.
        trains: what an optimizer step changes.
        peer: whether it is a mixture of somebody else's.
        decodes: whether decoding is measured; else it is that of another line.
        only_16_bit: measured over a base in 16 or 4 bits alone.
        pool: how many times the pool's weights it holds, of which each has a gradient and two moments.
        kept: bytes that a step keeps a token and layer beyond what the base keeps, as a function of the case.
    """

    title: str
    where: str
    kind: str
    trains: str
    peer: bool = False
    decodes: bool = True
    only_16_bit: bool = False
    pool: float = 0.0
    kept: Callable[[Case], float] = lambda case: 0.0

    def title_of(self, what: str) -> str:
        """As it is printed beside ``what``: decoding knows no stages."""
        return self.title.split(",")[0] if what == "decode" else self.title


def _widths(case: Case) -> tuple[int, int]:
    """Of what all projections of a layer read, and of what they put out."""
    pairs = case.projections.values()
    return sum(D for D, _ in pairs), sum(O for _, O in pairs)


def _x_lora(case: Case) -> float:
    read, put_out = _widths(case)
    return 4.0 * case.experts * (read + 2 * put_out + 4 * case.rank)


def _arrow(case: Case) -> float:
    _, put_out = _widths(case)
    return 4.0 * case.experts * (2 * put_out + 4 * case.rank)


def _chosen(case: Case) -> float:
    read, put_out = _widths(case)
    return 4.0 * case.top_k * (2 * read + 2 * put_out + 2 * case.rank) + 8.0 * 4 * case.experts


def _mola(case: Case) -> float:
    # eager attention: scores, mask, softmax in float32 and the base's dtype
    return _chosen(case) + 12.0 * case.heads * case.sequence + 16.0 * case.experts * case.top_k


HERE = "tests.bench.systems.ours"
PEFT = "tests.bench.systems.with_peft"

SYSTEMS: dict[str, System] = {
    "base": System("frozen base", "tests.bench.systems.base:build", "base", "nothing"),
    "lora": System("PEFT LoRA", f"{PEFT}:lora", "one", "the adapter"),
    "lora_without_autocast": System(
        "PEFT LoRA, no autocast",
        f"{PEFT}:lora_without_autocast",
        "one",
        "the adapter",
        decodes=False,
        only_16_bit=True,
    ),
    "lora_as_ours": System(
        "PEFT LoRA, AdamW and memory as ours", f"{PEFT}:lora_as_ours", "one", "the adapter", decodes=False
    ),
    "x_lora": System(
        "PEFT X-LoRA", f"{PEFT}:x_lora", "mixture", "adapters, classifier", peer=True, pool=1, kept=_x_lora
    ),
    "arrow": System("PEFT Arrow", f"{PEFT}:arrow", "mixture", "experts", peer=True, pool=1.5, kept=_arrow),
    "mola": System(
        "MoE-PEFT MoLA",
        "tests.bench.systems.mola:build",
        "mixture",
        "experts, routers",
        True,
        pool=1,
        kept=_mola,
    ),
    "loop": System(
        "plain loop",
        "tests.bench.systems.plain_loop:build",
        "mixture",
        "experts, routers",
        peer=True,
        pool=1,
        kept=_chosen,
    ),
    "stage_one": System("ours, stage one", f"{HERE}:stage_one", "hard", "experts", decodes=False, pool=1.25),
    "stage_two": System("ours, stage two", f"{HERE}:stage_two", "mixture", "experts, routers", pool=1.5),
    "frozen_experts": System(
        "ours, frozen experts", f"{HERE}:frozen_experts", "mixture", "routers", decodes=False, pool=0.5
    ),
}
DEFAULT = tuple(name for name in SYSTEMS if name != "frozen_experts")
OURS = "stage_two"
"""What peers are held against."""
REFERENCES = ("lora", "lora_without_autocast")
"""PEFT LoRA in the ways it is run; what is reported against is the faster one."""


def builder(name: str) -> Callable[[Case], Built]:
    """What builds a system, imported when it is asked for."""
    module, _, function = SYSTEMS[name].where.partition(":")
    found: Callable[[Case], Built] = getattr(importlib.import_module(module), function)
    return found


def bytes_wanted(name: str, case: Case) -> float:
    """About what a system takes in its largest moment; it decides who can stand beside whom."""
    system = SYSTEMS[name]
    base = (case.linear_weights + case.width * case.vocabulary) * BYTES[case.dtype]
    held = system.pool * case.experts * case.expert_weights + case.expert_weights
    # weights, gradients, two moments; decoding the weights alone
    pool = held * (16.0 if case.what == "train" else 4.0)
    if case.what == "decode":
        return base + pool
    wide = 2.0 if case.dtype != "float32" else 4.0
    a_token = case.layers * (wide * (10 * case.width + 4 * case.intermediate) + system.kept(case))
    return base + pool + case.tokens * (a_token + 12.0 * case.vocabulary)
