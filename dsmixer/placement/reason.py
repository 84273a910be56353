"""Why a layout was chosen, in words and numbers."""

from __future__ import annotations

from dsmixer.placement.choice import Candidate, usable_memory
from dsmixer.placement.memory import Layout
from dsmixer.placement.owners import owners_of, pack_slots
from dsmixer.placement.request import FLOAT32, PlanRequest
from dsmixer.placement.traffic import (
    dispatch_width,
    first_width,
    others,
    passes,
    tokens_exchange,
    weights_exchange,
)


def reason(request: PlanRequest, chosen: Candidate, found: list[Candidate]) -> str:
    """One sentence: the chosen layout's bytes against those of the best layout of every other mode."""
    cluster = request.cluster
    if cluster.world_size == 1:
        return f"{_name(chosen)}: one rank sends nothing, and {amount(chosen.peak)} is the lowest peak"
    if request.mode != "auto":
        return f"{_name(chosen)}, as the recipe says: {_cost(chosen)}"
    parts = [f"{_name(chosen)} sends {_cost(chosen)}"]
    for mode in dict.fromkeys(candidate.layout.mode for candidate in found):
        others_of_mode = [c for c in found if c.layout.mode == mode]
        if mode == chosen.layout.mode:
            parts += _left_out(request, chosen, others_of_mode)
            continue
        parts.append(_against(request, chosen, min(others_of_mode, key=lambda c: (c.fits is False, c.cost))))
    return "; ".join(parts)


def _left_out(request: PlanRequest, chosen: Candidate, same: list[Candidate]) -> list[str]:
    """Cheaper layouts of the chosen mode that do not fit."""
    cheaper = [c for c in same if c.fits is False and chosen.fits and c.cost < chosen.cost]
    return [_too_large(request, c) for c in cheaper[:1]]


def _against(request: PlanRequest, chosen: Candidate, other: Candidate) -> str:
    if other.fits is False and chosen.fits is not False:
        return _too_large(request, other)
    sign = "<" if chosen.cost[0] < other.cost[0] else "=" if chosen.cost[0] == other.cost[0] else ">"
    return f"{_cost(chosen)} {sign} {_cost(other)} of {_name(other)}"


def _too_large(request: PlanRequest, other: Candidate) -> str:
    assert request.cluster.device_memory is not None
    usable = usable_memory(request.cluster.device_memory)
    return f"{_name(other)} needs {amount(other.peak)} > {amount(usable)} a rank may fill"


def _name(candidate: Candidate) -> str:
    layout = candidate.layout
    spread = f" and EP {layout.expert_parallel_size}" if layout.expert_parallel_size > 1 else ""
    return f"{layout.mode} with ZeRO {layout.zero_stage}{spread}"


def _cost(candidate: Candidate) -> str:
    sent = f"{amount(candidate.sent)} a step"
    return sent if candidate.seconds is None else f"{sent} in {candidate.seconds:.3g} s"


def exchanges(request: PlanRequest, chosen: Candidate) -> str:
    """The experts' weights and stage two's tokens of one micro-batch on the wire, as formulas with numbers.

    For EP the chosen layout's, or as many ranks as there can be where it does not spread the experts.
    """
    world, pool = request.cluster.world_size, request.pool
    if world == 1:
        return "one rank: nothing is sent"
    weights = weights_exchange(request)
    text = (
        f"weights 3·R·E·Σ(D+O)·b_w·(W−1)/W = 3·{pool.rank}·{pool.num_experts}·{request.model.width:,}·"
        f"{FLOAT32}·{others(world):.3f} = {amount(weights)} a micro-batch"
    )
    layout = _spread(request, chosen)
    stage = request.stages[-1]
    copies = layout.copies(request, stage)
    if copies is None:
        return f"{text}; stage one sends no tokens"
    num_copies = copies.most_moved
    tokens = tokens_exchange(request, stage.tokens, num_copies)
    less = first_width(request)
    formula, numbers = f"{passes(request)}·Σ(D+O)", f"{passes(request)}·{dispatch_width(request):,}"
    if less:
        formula, numbers = f"({formula}−D₀)", f"({numbers}−{less:,})"
    sign = "<" if tokens < weights else ">"
    return (
        f"tokens n·K̂·{formula}·b_x = {stage.tokens}·{num_copies:.3f}·{numbers}·{request.base_bytes} = "
        f"{amount(tokens)} {sign} {text} (EP {layout.expert_parallel_size}, "
        f"K {stage.named(pool.num_experts)}); stage one sends no tokens"
    )


def _spread(request: PlanRequest, chosen: Candidate) -> Layout:
    """The chosen layout, or in its place one that spreads the experts over all ranks."""
    if chosen.layout.expert_parallel_size > 1:
        return chosen.layout
    world = request.cluster.world_size
    slots = request.slots or pack_slots(request.pool.tokens, world)
    return Layout("tokens", chosen.layout.zero_stage, owners_of(slots, world))


def amount(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes:.0f} B"
