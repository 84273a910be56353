"""The runs that the parity tests compare, by name. All runs of one world size share a launch.

``wWzZ`` is the plain run on W ranks with ZeRO Z; the others say in what they differ from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from support.tiny import STATE_SPACE

LONG = os.environ.get("DSMIXER_LONG") == "1"
"""Whether the whole matrix runs: minutes more, by hand."""

SMALL_GATHERS = Path(__file__).with_name("small_gathers.json")
SMALL_BUCKET = Path(__file__).with_name("small_bucket.json")
OFFLOAD_OPTIMIZER = Path(__file__).with_name("offload_optimizer.json")
OFFLOAD_ALL = Path(__file__).parents[2] / "ds_configs" / "zero3_offload.json"
COPIES = 8
IDLE_EXPERTS = [f"{domain}{i}" for domain in ("sums", "words", "rare") for i in range(COPIES)]


@dataclass(frozen=True)
class Case:
    """One run: see ``driver_runs.py``. ``commands``: the stages of each call of ``train``, one after another.
    ``kind``: ``llama``, ``gpt2``, ``t5``, ``flan``, one of ``support.tiny.STATE_SPACE``, ``llama24`` with 24
    domains and experts, or ``uneven6`` and ``uneven5`` with so many, the first of which is larger than all
    others together."""

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


@dataclass(frozen=True)
class Layout:
    """A pair of mode and ZeRO stage on W ranks, with EP."""

    ranks: int
    mode: str
    zero_stage: int
    expert_parallel_size: int = 1

    @property
    def name(self) -> str:
        ep = f"ep{self.expert_parallel_size}" if self.mode == "tokens" else ""
        return f"w{self.ranks}_{self.mode}{ep}_z{self.zero_stage}"

    @property
    def overrides(self) -> tuple[str, ...]:
        placed = (f"placement.mode={self.mode}", zero(self.zero_stage))
        return (*placed, f"placement.expert_parallel_size={self.expert_parallel_size}")


def layouts(ranks: int) -> list[Layout]:
    """Every pair that runs on so many ranks, with every EP."""
    found = [Layout(ranks, "replicate", stage) for stage in range(3)] + [Layout(ranks, "weights", 3)]
    sizes = [size for size in (2, 4) if size <= ranks]
    return found + [Layout(ranks, "tokens", stage, ep) for stage in (1, 2, 3) for ep in sizes]


PLACED = (*both(max_steps=10),)


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
    yield from _placed_short()
    yield from _expert_faults()
    yield from _resharded()
    yield from (*four_bit_cases(), *_four_bit_special())
    for fault in DISK_FAULTS:
        yield Case(fault, 2, (zero(2),), options={"fault": fault, "fails": fault == "full_at_the_end"})
    yield from _low_memory()
    yield from _encoder_decoder()
    yield from _state_space()
    yield from _routing_losses()
    yield from _feed_forward()
    yield Case("hard_oracle", 2, (zero(2), *HARD_ORACLE))
    yield Case("hard_oracle_nf4", 2, (zero(2), *HARD_ORACLE, "base.quantization=nf4"))
    yield Case("hard_oracle_gpt2", 2, (zero(1), *HARD_ORACLE), kind="gpt2", commands=((1,),))
    yield Case("soft_oracle", 2, (zero(2), *SOFT_ORACLE))


TERMS = (
    "stage2.routing_loss=[{loss: switch}, {loss: z}, {loss: quadratic}, {loss: tsallis}, "
    "{loss: mutual_information, settings: {weight: 0.1}}, {loss: gmoe_normal, settings: {weight: 0.1}}, "
    "{loss: mole, settings: {alpha: 0.05}}, {loss: supervised_gate, settings: {weight: 0.5}}]"
)


AESL = (
    "stage2.routing_loss=[{loss: switch, settings: {alpha: 0.2}}, {loss: aesl_orthogonality, "
    "settings: {weight: 0.5}}, {loss: aesl_variance, settings: {weight: 0.3}}]"
)


def _routing_losses() -> Iterator[Case]:
    """Losses of all kinds at once, each with its own usage of the step before."""
    spread = Layout(2, "tokens", 2, 2)
    yield Case("terms_one", 1, (zero(1), TERMS))
    yield Case("terms_spread", 2, (*spread.overrides, TERMS))
    yield Case("terms_stopped", 2, (*spread.overrides, TERMS), options={"stop_at": [[2, 3]]})
    aesl = (zero(2), *SOFT_ORACLE, AESL, UNPACKED)
    yield Case("aesl_oracle", 2, aesl)  # four micro-batches on each rank
    yield Case("aesl_once", 1, (*aesl, *both(micro_batch_size=8), "checkpoint.every=3"))


FEED_FORWARD = [Layout(2, "replicate", 2), Layout(2, "tokens", 1, 2), Layout(2, "weights", 3)]


def _feed_forward() -> Iterator[Case]:
    """Experts on the feed-forward part too, gate and up on one router."""
    for layout in FEED_FORWARD:
        roles = ("mixer.targets=[q, v, gate, up, down]", "mixer.router=per_block")
        yield Case(f"mlp_{layout.name}", 2, (*both(max_steps=3), *roles, *layout.overrides))


def _encoder_decoder() -> Iterator[Case]:
    """T5, its embedding tied to its head, and Flan-T5's shape; all of them on two ranks, in one launch."""
    for layout in SIDES_SHORT:
        options = {"finish": layout.mode != "replicate" or layout.zero_stage == 2}
        overrides = (*both(max_steps=4), UNPACKED, *layout.overrides)
        if layout.zero_stage == 3:
            overrides = (*overrides, f"deepspeed.config={SMALL_GATHERS}")
        yield Case(f"t5_{layout.name}", 2, overrides, kind="t5", options=options)
    one, spread, cut = SIDES_SHORT[0], Layout(2, "tokens", 1, 2), Layout(2, "weights", 3)
    few = (*both(max_steps=3), UNPACKED)
    for layout in (one, spread) if LONG else ():
        all_roles = "mixer.targets=[q, k, v, o, up, down]"
        overrides = (*few, *layout.overrides, "mixer.router=per_block", CHECKPOINTED, all_roles)
        yield Case(f"t5_block_{layout.name}", 2, overrides, kind="t5")
    for layout in (one, cut, spread):
        packed = (*few, *layout.overrides, "base.quantization=nf4", "mixer.targets=[q, v, gate, up, down]")
        yield Case(f"flan_nf4_{layout.name}", 2, packed, kind="flan")
    imported = (*few, *cut.overrides, "stage1.enabled=false", "stage2.experts=frozen")
    source = {"adapters": f"t5_{one.name}", "finish": True}
    yield Case("t5_imported", 2, imported, kind="t5", options=source)
    yield Case("hard_oracle_t5", 2, (zero(2), *HARD_ORACLE, UNPACKED), kind="t5", commands=((1,),))
    yield Case("soft_oracle_flan", 2, (zero(2), *SOFT_ORACLE, UNPACKED), kind="flan")


def state_space_layouts(kind: str) -> list[Layout]:
    """Where each kind is trained on two ranks; all are compared with the first, which oracles hold."""
    first = [Layout(2, "replicate", 2), Layout(2, "weights", 3), Layout(2, "tokens", 1, 2)]
    return [*first, Layout(2, "tokens", 3, 2)] if LONG and kind == "falcon_mamba" else first


def four_bit_scans() -> list[str]:
    """Kinds that are trained in 4 bits too."""
    return list(STATE_SPACE) if LONG else ["falcon_mamba"]


def _state_space() -> Iterator[Case]:
    """Mamba, Falcon-Mamba and Mamba-2; weights cut by ZeRO-3 however small they are; layers run again,
    in runs that a signal stops in both stages."""
    few = (*both(max_steps=4), UNPACKED, "stage1.clip=1.3", "stage2.router_learning_rate=0.01")
    small = f"deepspeed.config={SMALL_GATHERS}"
    for kind in STATE_SPACE:
        for layout in state_space_layouts(kind):
            own = {1: (CHECKPOINTED,), 2: EVERY_STEP, 3: (small,)}[layout.zero_stage]
            options: dict[str, Any] = {"finish": layout.mode == "weights"}
            if layout.mode == "tokens" and layout.zero_stage == 1:
                options = {"stop_at": [[1, 2], [2, 3]]}
            yield Case(f"{kind}_{layout.name}", 2, (*few, *own, *layout.overrides), kind, options=options)
    for kind in four_bit_scans():
        for layout in (Layout(2, "replicate", 2), Layout(2, "weights", 3)):
            own = (small,) if layout.zero_stage == 3 else ()
            overrides = (*few, *layout.overrides, *own, "base.quantization=nf4")
            yield Case(f"{kind}_nf4_{layout.name}", 2, overrides, kind)


EIGHT_BIT = both(optimizer="adamw_8bit")


def _low_memory() -> Iterator[Case]:
    """What is kept elsewhere, or in fewer bits."""
    for stage in (1, 2):
        yield Case(f"offload_z{stage}", 2, (zero(stage), f"deepspeed.config={OFFLOAD_OPTIMIZER}"))
    yield Case("offload_z3", 2, (zero(3), f"deepspeed.config={OFFLOAD_ALL}"))
    spread = Layout(4 if LONG else 2, "tokens", 1, 2)
    for name, ranks, overrides in (
        ("eight_bit_z2", 2, (zero(2),)),
        ("eight_bit_z3", 2, (zero(3),)),
        ("eight_bit_spread", spread.ranks, spread.overrides),
    ):
        yield Case(name, ranks, (*overrides, *EIGHT_BIT))
    yield Case("eight_bit_stopped_z2", 2, (zero(2), *EIGHT_BIT), options={"stop_at": [[1, 2], [2, 5]]})


def placed(layout: Layout, experts: str = "preserve", num_experts: int = 6) -> Case:
    """A run of ten steps a stage in a layout; six experts or five, trained on or frozen in stage two."""
    overrides = (*PLACED, *layout.overrides, f"stage2.experts={experts}")
    return Case(f"{layout.name}_{experts}{num_experts}", layout.ranks, overrides, kind=f"uneven{num_experts}")


SIDES_SHORT = [
    Layout(2, "replicate", 2),
    Layout(2, "weights", 3),
    Layout(2, "tokens", 1, 2),
    *((Layout(2, "replicate", 0), Layout(2, "tokens", 3, 2)) if LONG else ()),
]
"""Of the encoder-decoder runs; all are compared with the first, which the oracles hold to plain training."""
FOUR_BIT_SHORT = [
    Layout(1, "replicate", 0),
    Layout(2, "replicate", 1),
    Layout(2, "weights", 3),
    Layout(2, "tokens", 3, 2),
]
BF16_SHORT = [Layout(1, "replicate", 0), Layout(2, "weights", 3)]


def four_bit(layout: Layout, dtype: str = "float32", kind: str = "nf4") -> Case:
    """A run of three steps a stage on a base in 4 bits, of whose weights none stays gathered under ZeRO-3."""
    overrides = (*both(max_steps=3), *layout.overrides, f"base.quantization={kind}", f"base.dtype={dtype}")
    if layout.zero_stage == 3:
        overrides = (*overrides, f"deepspeed.config={SMALL_GATHERS}")
    # a finished run of each way to hold the base is evaluated too, and published
    options = {"finish": True} if layout.mode != "replicate" or layout.ranks == 1 else {}
    return Case(f"{kind}_{dtype}_{layout.name}", layout.ranks, overrides, options=options)


def four_bit_cases() -> list[Case]:
    """Those of ``test_quantized`` that are compared with the plain run of their dtype on one rank."""
    more = [layout for ranks in (1, 2) for layout in layouts(ranks)] if LONG else []
    found = {}
    for dtype, short in (("float32", FOUR_BIT_SHORT), ("bfloat16", BF16_SHORT)):
        for layout in (*short, *more):
            case = four_bit(layout, dtype)
            found[case.name] = case
    return list(found.values())


def _four_bit_special() -> Iterator[Case]:
    """What the pairs leave out, on one rank and cut by ZeRO-3 on two."""
    one, cut = Layout(1, "replicate", 0), Layout(2, "weights", 3)
    for layout in (one, cut):
        plain, single = four_bit(layout), four_bit(layout, kind="fp4")
        yield replace(single, overrides=(*single.overrides, "base.double_quantization=false"), options={})
        yield replace(plain, name=f"gpt2_{plain.name}", kind="gpt2", options={})
        imported = (*plain.overrides, "stage1.enabled=false", "stage2.experts=frozen")
        source = {"adapters": plain.name}
        yield replace(plain, name=f"{plain.name}_imported", overrides=imported, options=source)
    again = four_bit(cut)
    checkpointed = (*again.overrides, CHECKPOINTED)
    yield replace(again, name=f"{again.name}_checkpointed", overrides=checkpointed, options={})


def _placed_short() -> Iterator[Case]:
    for num_experts in (6, 5):
        yield placed(Layout(1, "replicate", 0), "preserve", num_experts)
    yield placed(Layout(1, "replicate", 0), "frozen", 6)
    for stage in (1, 3):
        yield placed(Layout(2, "tokens", stage, 2), "preserve", 6)
    yield placed(Layout(4, "tokens", 1, 2), "preserve", 5)
    yield placed(Layout(4, "tokens", 2, 4), "preserve", 6)
    yield from _placed_special()


def _expert_faults() -> Iterator[Case]:
    for fault in expert_faults():
        case = placed(Layout(4, "tokens", 2, 4), "preserve", 6)
        yield Case(f"fault_{fault}", 4, case.overrides, kind=case.kind, options={"fault": fault})


def _placed_special() -> Iterator[Case]:
    """What a case of the matrix leaves out; ``PLACED_LIKE`` says what it is compared with."""
    if LONG:
        # a bucket that is full after one parameter on one rank and after another on the next
        small = placed(Layout(4, "tokens", 1, 4))
        yield replace(
            small, name="w4_z1_bucket6", overrides=(*small.overrides, f"deepspeed.config={SMALL_BUCKET}")
        )
    # weights that ZeRO-3 would gather ahead, or keep, at other moments on ranks with larger banks
    base = placed(Layout(4, "tokens", 3, 4))
    yield replace(
        base, name="w4_z3_gathers6", overrides=(*base.overrides, f"deepspeed.config={SMALL_GATHERS}")
    )
    # routers alone train in a process of their own
    only = placed(Layout(4, "tokens", 2, 2), "frozen")
    yield replace(only, name="w4_z2_apart6", commands=((1,), (2,)))
    for layout in (Layout(1, "replicate", 0), Layout(4, "tokens", 1, 2)):
        block = placed(layout)
        overrides = (*block.overrides, "mixer.router=per_block", CHECKPOINTED)
        yield replace(block, name=f"{layout.name}_block6", overrides=overrides)


DISK_FAULTS = ("full_between", "full_at_the_end")

SAVED = "saved_w2"
"""The run whose checkpoints others go on from; its accumulation is written, so that rows have to be kept."""
ACCUMULATED = both(global_batch_size="null", gradient_accumulation_steps=4)
RESHARDED = {
    "reshard_w1": (Layout(1, "replicate", 0), (1, 3), ()),
    "reshard_w4_ep4_z3": (Layout(4, "tokens", 3, 4), (1, 3), both(micro_batch_size=2)),
    "reshard_w4_ep2_z1": (Layout(4, "tokens", 1, 2), (2, 3), ()),
    "reshard_w2_weights": (Layout(2, "weights", 3), (1, 3), ()),
}
"""Layout that goes on, after which stage and step of ``SAVED``, and what else changes."""


def _resharded() -> Iterator[Case]:
    saved = (*Layout(2, "tokens", 2, 2).overrides, *ACCUMULATED)
    yield Case(SAVED, 2, saved, kind="uneven6")
    for name, (layout, (stage, step), others) in RESHARDED.items():
        overrides = (*layout.overrides, *ACCUMULATED, *others)
        options: dict[str, Any] = {"take": [SAVED, stage, step]}
        if name == "reshard_w1":  # with all that the run has saved, and back
            options = {"take": [SAVED, 2, 6], "start_from": f"stage{stage}/step-{step:08d}"}
        yield Case(name, layout.ranks, overrides, kind="uneven6", options=options)
    changed = {"take": [SAVED, 1, 3], "allow_changes": True}
    one = (*Layout(1, "replicate", 0).overrides, *ACCUMULATED)
    yield Case("changed_w1", 1, (*one, *both(learning_rate=1e-3), "run.seed=4"), "uneven6", options=changed)


PLACED_LIKE = {"bucket6": "preserve6", "gathers6": "preserve6", "apart6": "frozen6"}

EXPERT_FAULTS = ("owners_apart", "owners_counted_twice", "preserve_times_ep")


def expert_faults() -> tuple[str, ...]:
    """Of this call of pytest."""
    return EXPERT_FAULTS if LONG else EXPERT_FAULTS[:1]


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


def _placed_long() -> Iterator[Case]:
    short = {case.name for case in _placed_short()}
    for ranks in (1, 2, 4):
        for layout in layouts(ranks):
            for experts in ("preserve", "frozen"):
                for num_experts in (6, 5):
                    case = placed(layout, experts, num_experts)
                    if case.name not in short:
                        yield case


def placed_cases() -> list[Case]:
    """Those of ``test_placement`` of this call of pytest, without the faults."""
    return [*_placed_short(), *(_placed_long() if LONG else ())]


def all_cases() -> list[Case]:
    """Those of this call of pytest."""
    cases = [*_short(), *(_long() if LONG else ()), *(_placed_long() if LONG else ())]
    return [_with_mode(case) for case in cases]


def _with_mode(case: Case) -> Case:
    """A case that names no mode does not spread its experts: the plan's choice is not what it is about."""
    if any(override.startswith("placement.mode") for override in case.overrides):
        return case
    mode = "weights" if zero(3) in case.overrides else "replicate"
    return replace(case, overrides=(*case.overrides, f"placement.mode={mode}"))


def names(prefix: str) -> list[str]:
    """Names of the cases that begin so, for parametrisation."""
    return [case.name for case in all_cases() if case.name.startswith(prefix)]
