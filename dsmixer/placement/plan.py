"""Where experts live and what each rank holds and sends: arithmetic alone, no torch.distributed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from dsmixer.placement.choice import Candidate, candidates, choose, usable_memory
from dsmixer.placement.memory import rank_bytes, router_weights
from dsmixer.placement.reason import exchanges, reason
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
        candidates: every layout there is, the cheapest first.
        reason: why this one, as an inequality with its numbers.
        exchange: the bytes of ``weights`` and ``tokens`` a micro-batch, as formulas with their numbers.
        notes: what else to know, a line each.
        remedies: where nothing fits, what would; a line each.
    """

    request: PlanRequest
    chosen: Candidate
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
        """Plain JSON values; ``bytes_per_rank`` is of the rank that has most, ``places`` of each EP rank."""
        cluster, pool, owners = self.request.cluster, self.request.pool, self.chosen.owners
        return {
            "mode": self.mode,
            "zero_stage": self.zero_stage,
            "world_size": cluster.world_size,
            "ranks_per_node": cluster.ranks_per_node,
            "expert_parallel_size": self.expert_parallel_size,
            "expert_data_parallel_size": cluster.world_size // self.expert_parallel_size,
            "fits": self.chosen.fits,
            "device_memory": cluster.device_memory,
            "reason": self.reason,
            "exchange": self.exchange,
            "notes": list(self.notes),
            "remedies": list(self.remedies),
            "bytes_per_rank": {name: m.to_dict() for name, m in self.chosen.memory.items()},
            "places": [self._place(number) for number in range(self.expert_parallel_size)],
            "bytes_sent_per_step": {name: t.to_dict() for name, t in self.chosen.traffic.items()},
            "num_experts": pool.num_experts,
            "busiest_over_mean": round(owners.imbalance, 4),
            "layouts": [_layout(candidate) for candidate in self.candidates],
            "owners": {
                pool.name(e): {str(rank): round(share, 4) for rank, share in parts}
                for e, parts in enumerate(owners.parts)
            }
            if self.expert_parallel_size > 1
            else "every rank owns every expert",
        }

    def _place(self, number: int) -> dict[str, Any]:
        """What the ranks with one place in their groups hold."""
        layout = self.chosen.layout
        predicted = [rank_bytes(self.request, layout, stage, number) for stage in self.request.stages]
        return {
            "ep_rank": number,
            "experts": layout.held[number],
            "load_over_mean": round(self.chosen.owners.load_over_mean(number), 4),
            "held_bytes": {s.name: p.held for s, p in zip(self.request.stages, predicted, strict=True)},
            "peak_bytes": {s.name: p.peak for s, p in zip(self.request.stages, predicted, strict=True)},
        }


def _layout(candidate: Candidate) -> dict[str, Any]:
    return {
        "mode": candidate.layout.mode,
        "zero_stage": candidate.layout.zero_stage,
        "expert_parallel_size": candidate.layout.expert_parallel_size,
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
        UserError: mode, ZeRO stage and EP of the request go together in no layout.
    """
    found = candidates(request)
    chosen = choose(found)
    return Plan(
        request=request,
        chosen=chosen,
        candidates=tuple(found),
        reason=reason(request, chosen, found),
        exchange=exchanges(request, chosen),
        notes=tuple(_notes(request, chosen)),
        remedies=tuple(remedies(request)) if chosen.fits is False else (),
    )


def _notes(request: PlanRequest, chosen: Candidate) -> list[str]:
    notes = []
    together = Counter(p.block for p in request.model.projections)
    shared = [p.in_features for p in request.model.projections if together[p.block] > 1]
    narrowest, experts = min(shared, default=0), request.pool.num_experts
    if request.pool.router == "per_projection" and shared and experts > narrowest / ROUTER_SHARE:
        weights = router_weights(request)
        notes.append(
            f"mixer.router: per_block is worth it: E = {experts} > D/8 = {narrowest / ROUTER_SHARE:g}, and "
            f"the routers weigh {weights:,} ({weights * FLOAT32 / 1e9:,.2f} GB)"
        )
    if request.four_bit and chosen.layout.zero_stage == 3:
        notes.append(
            "a 4-bit base is whole on every rank while it is loaded; ZeRO-3 cuts it then, but for its scales"
        )
    scan = request.model.layer.state_space
    if scan is not None:
        notes.append(
            "activations of state-space layers are what the fused kernels of mamba_ssm and causal_conv1d "
            "keep by their source; not measured"
            if scan.fused
            else "activations of state-space layers are those of transformers' plain scan: mamba_ssm and "
            "causal_conv1d are not here, whose kernels keep and take far less"
        )
    if chosen.fits is False and request.cluster.device_memory is not None:
        notes.append(
            f"does not fit: {chosen.peak / 1e9:,.1f} GB at the peak, of "
            f"{usable_memory(request.cluster.device_memory) / 1e9:,.1f} GB that may be used"
        )
    return notes
