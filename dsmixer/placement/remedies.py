"""What would make a plan fit that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dsmixer.config.errors import UserError
from dsmixer.placement.choice import Candidate, decide
from dsmixer.placement.request import PlanRequest

MOST_RANKS = 4096
SMALLEST_RANK = 8

Change = tuple[str, PlanRequest]


def remedies(request: PlanRequest) -> list[str]:
    """Changes that make the plan fit, each a line with the layout and peak it leads to.

    Single changes first; if none of those is enough, the ones that cost no quality together; at last more
    ranks with them.

    Args:
        request: of a plan that does not fit.
    """
    found = [line for change in _single(request) if (line := _tried(change)) is not None]
    if found:
        return found
    together = _together(request)
    line = _tried(together)
    if line is not None:
        return [line]
    label, changed = together
    ranks = next((_tried((f"{label}, {more}", tried)) for more, tried in _more_ranks(changed)), None)
    if ranks is not None:
        return [ranks]
    return [f"nothing that was tried: with {label} a rank still needs {_giga(decide(changed).peak)}"]


def _single(request: PlanRequest) -> Iterator[Change]:
    yield from _lighter(request)
    yield from _other_layouts(request)
    yield from _smaller_rank(request)
    yield from list(_more_ranks(request))[:1]


def _lighter(request: PlanRequest) -> Iterator[Change]:
    """Changes of the recipe that leave the method as it is, and a 4-bit base."""
    if not request.checkpointing:
        yield "base.activation_checkpointing: true", replace(request, checkpointing=True)
    if any(stage.rows > 1 for stage in request.stages):
        stages = tuple(replace(s, rows=1, accumulation=s.accumulation * s.rows) for s in request.stages)
        yield "micro_batch_size: 1 with more accumulation", replace(request, stages=stages)
    if request.pool.router == "per_projection" and any(s.top_k is not None for s in request.stages):
        pool = replace(request.pool, router="per_block")
        yield "mixer.router: per_block", replace(request, pool=pool)
    if any(stage.trains_experts and not stage.eight_bit for stage in request.stages):
        stages = tuple(
            replace(s, eight_bit=s.trains_experts, origin_on_host=s.keeps_origin) for s in request.stages
        )
        host = ", stage2.preserve.origin: host" if any(s.keeps_origin for s in request.stages) else ""
        yield f"optimizer: adamw_8bit{host}", replace(request, stages=stages)
    if any(stage.keeps_origin for stage in request.stages):
        stages = tuple(replace(s, trains_experts=s.top_k is None, keeps_origin=False) for s in request.stages)
        yield "stage2.experts: frozen", replace(request, stages=stages)
    if not request.four_bit:
        yield "base.quantization: nf4", replace(request, four_bit=True)


def _other_layouts(request: PlanRequest) -> Iterator[Change]:
    """Layouts that the recipe leaves out."""
    tried = replace(request, mode="auto", zero_stage=None, expert_parallel_size=None)
    if tried != request:
        yield "placement.mode, expert_parallel_size and deepspeed.zero_stage", tried


def _smaller_rank(request: PlanRequest) -> Iterator[Change]:
    rank = request.pool.rank
    while rank > SMALLEST_RANK:
        rank //= 2
        ranks = tuple(min(rank, r) for r in request.pool.ranks)
        changed = replace(request, pool=replace(request.pool, ranks=ranks))
        if decide(changed).fits:
            yield f"mixer.rank: {rank}", changed
            return


def _more_ranks(request: PlanRequest) -> Iterator[Change]:
    """The first doubling of the ranks that fits."""
    world = request.cluster.world_size
    while world < MOST_RANKS:
        world *= 2
        changed = replace(request, cluster=replace(request.cluster, world_size=world))
        if decide(changed).fits:
            yield f"{world} ranks", changed
            return


def _together(request: PlanRequest) -> Change:
    labels, changed = [], request
    for name in ("base.activation_checkpointing", "micro_batch_size", "mixer.router", "placement.mode"):
        for label, tried in (*_lighter(changed), *_other_layouts(changed)):
            if label.startswith(name):
                labels.append(label)
                changed = tried
                break
    return ", ".join(labels) or "the recipe as it is", changed


def _tried(change: Change) -> str | None:
    label, request = change
    try:
        best = decide(request)
    except UserError:
        return None
    return f"{label}: {describe(best)} needs {_giga(best.peak)}" if best.fits else None


def describe(candidate: Candidate) -> str:
    """A layout in a few words."""
    layout = candidate.layout
    spread = f", EP {layout.expert_parallel_size}" if layout.expert_parallel_size > 1 else ""
    return f"{layout.mode} with ZeRO {layout.zero_stage}{spread}"


def _giga(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
