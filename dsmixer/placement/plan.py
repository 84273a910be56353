"""Where experts live and what each rank holds and sends: arithmetic alone, no torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsmixer.placement.choice import Candidate, candidates, choose, usable_memory
from dsmixer.placement.memory import router_weights
from dsmixer.placement.reason import amount, exchanges, reason
from dsmixer.placement.remedies import remedies
from dsmixer.placement.request import FLOAT32, PlanRequest

ROUTER_SHARE = 8
"""``per_block`` routers are proposed once E > D / 8."""


@dataclass(frozen=True)
class Plan:
    """A placement and what it predicts.

    Attributes:
        request: what it was made from.
        chosen: the layout to use.
        runnable: the best that a run of the recipe takes, None where it takes none.
        candidates: every layout there is, the cheapest first.
        reason: why this one, as an inequality with its numbers.
        exchange: the bytes of ``weights`` and ``tokens`` a micro-batch, as formulas with their numbers.
        notes: what else to know, a line each.
        remedies: where nothing fits, what would; a line each.
    """

    request: PlanRequest
    chosen: Candidate
    runnable: Candidate | None
    candidates: tuple[Candidate, ...]
    reason: str
    exchange: str
    notes: tuple[str, ...]
    remedies: tuple[str, ...]

    @property
    def mode(self) -> str:
        return self.chosen.layout.mode

    @property
    def zero_stage(self) -> int:
        return self.chosen.layout.zero_stage

    @property
    def expert_parallel_size(self) -> int:
        """EP."""
        return self.chosen.layout.expert_parallel_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; bytes are of the rank that has most."""
        cluster, pool, owners = self.request.cluster, self.request.pool, self.chosen.owners
        return {
            "mode": self.mode,
            "zero_stage": self.zero_stage,
            "world_size": cluster.world_size,
            "expert_parallel_size": self.expert_parallel_size,
            "expert_data_parallel_size": cluster.world_size // self.expert_parallel_size,
            "available": self.chosen.available,
            "fits": self.chosen.fits,
            "device_memory": cluster.device_memory,
            "reason": self.reason,
            "exchange": self.exchange,
            "notes": list(self.notes),
            "remedies": list(self.remedies),
            "bytes_per_rank": {name: m.to_dict() for name, m in self.chosen.memory.items()},
            "bytes_sent_per_step": {name: t.to_dict() for name, t in self.chosen.traffic.items()},
            "num_experts": pool.num_experts,
            "busiest_over_mean": round(owners.imbalance, 4),
            "runnable": None if self.runnable is None else _layout(self.runnable),
            "layouts": [_layout(candidate) for candidate in self.candidates],
            "owners": {
                pool.name(e): {str(rank): round(share, 4) for rank, share in parts}
                for e, parts in enumerate(owners.parts)
            }
            if self.expert_parallel_size > 1
            else "every rank owns every expert",
        }


def _layout(candidate: Candidate) -> dict[str, Any]:
    return {
        "mode": candidate.layout.mode,
        "zero_stage": candidate.layout.zero_stage,
        "expert_parallel_size": candidate.layout.expert_parallel_size,
        "available": candidate.available,
        "fits": candidate.fits,
        "peak_bytes": candidate.peak,
        "sent_bytes": round(candidate.sent),
        "exchange_seconds": candidate.seconds,
    }


def make_plan(request: PlanRequest) -> Plan:
    """Decide where the experts live.

    Among the layouts that the request leaves open and that fit the device, the one that
    sends least (or, where link speeds are known, whose exchanges take least time), then the one with the
    lowest peak.

    Args:
        request: model, pool, cluster and training shape.

    Raises:
        UserError: mode, ZeRO stage and EP of the request go together in no layout that a run takes.
    """
    found = candidates(request)
    chosen, runnable = choose(found, only_available=request.only_available), _runnable(found)
    return Plan(
        request=request,
        chosen=chosen,
        runnable=runnable,
        candidates=tuple(found),
        reason=reason(request, chosen, found),
        exchange=exchanges(request, chosen),
        notes=tuple((*_by_name(chosen, runnable), *_notes(request, chosen, found))),
        remedies=tuple(remedies(request)) if chosen.fits is False else (),
    )


def _runnable(found: list[Candidate]) -> Candidate | None:
    return choose(found, only_available=True) if any(c.available for c in found) else None


def _by_name(chosen: Candidate, runnable: Candidate | None) -> list[str]:
    """What a run takes where it does not take the choice by itself."""
    if chosen.available:
        return []
    mode, instead = chosen.layout.mode, "with auto it takes nothing that the recipe leaves open"
    if runnable is not None:
        other = runnable.layout
        fit = ", which does not fit" if runnable.fits is False else ""
        instead = (
            f"with auto and deepspeed.zero_stage: {other.zero_stage} it takes {other.mode} "
            f"(a peak of {amount(runnable.peak)}, {amount(runnable.sent)} sent a step){fit}"
        )
    return [f"a run takes {mode} only by name: placement.mode: {mode}; {instead}"]


def _notes(request: PlanRequest, chosen: Candidate, found: list[Candidate]) -> list[str]:
    notes = []
    better = found[0]
    if not better.available and chosen.available and better.fits is not False and better.cost < chosen.cost:
        notes.append(
            f"{better.layout.mode} with ZeRO {better.layout.zero_stage} and EP "
            f"{better.layout.expert_parallel_size} would be better (a peak of {better.peak / 1e9:,.1f} GB, "
            f"{better.sent / 1e9:,.1f} GB sent); a run takes it only by name, "
            f"placement.mode: {better.layout.mode}"
        )
    narrowest = min((p.in_features for p in request.model.projections), default=0)
    experts = request.pool.num_experts
    if request.pool.router == "per_projection" and experts > narrowest / ROUTER_SHARE:
        weights = router_weights(request)
        notes.append(
            f"mixer.router: per_block is worth it: E = {experts} > D/8 = {narrowest / ROUTER_SHARE:g}, and "
            f"the routers weigh {weights:,} ({weights * FLOAT32 / 1e9:,.2f} GB)"
        )
    if request.four_bit:
        notes.append(
            "a 4-bit base is whole on every rank, whatever the ZeRO stage; this version does not load one yet"
        )
    if chosen.fits is False and request.cluster.device_memory is not None:
        notes.append(
            f"does not fit: {chosen.peak / 1e9:,.1f} GB at the peak, of "
            f"{usable_memory(request.cluster.device_memory) / 1e9:,.1f} GB that may be used"
        )
    return notes
