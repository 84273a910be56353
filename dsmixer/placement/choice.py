"""The layouts there are, and which one to take: by bytes on the wire, then by memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsmixer.config.errors import UserError
from dsmixer.placement.memory import Layout, RankBytes, rank_bytes
from dsmixer.placement.owners import Owners, owners_of, pack_slots
from dsmixer.placement.request import MODES, ZERO_STAGES, PlanRequest
from dsmixer.placement.traffic import StepTraffic, step_seconds, step_traffic

RESERVED = 0.06
"""Share of a device's memory that is left to the driver, the libraries and what the allocator loses."""


@dataclass(frozen=True)
class Candidate:
    """A layout with what it costs.

    Attributes:
        layout: the placement.
        memory: bytes of the rank with most experts, by stage.
        traffic: bytes sent a step, by stage.
        fits: whether the peak stays within the device; None where its memory is not known.
        seconds: the exchanges of one step of each stage; None where no link speed is known.
    """

    layout: Layout
    memory: dict[str, RankBytes]
    traffic: dict[str, StepTraffic]
    fits: bool | None
    seconds: float | None

    @property
    def owners(self) -> Owners:
        """Of the experts among the EP ranks."""
        return self.layout.owners

    @property
    def peak(self) -> int:
        """Bytes, the most of any stage."""
        return max(memory.peak for memory in self.memory.values())

    @property
    def sent(self) -> float:
        """Bytes, one step of each stage."""
        return sum(traffic.total for traffic in self.traffic.values())

    @property
    def cost(self) -> tuple[float, int, int]:
        """What the choice goes by: time or bytes on the wire, then memory, then the lower ZeRO stage."""
        return (self.sent if self.seconds is None else self.seconds, self.peak, self.layout.zero_stage)


def usable_memory(device_memory: int) -> int:
    """Bytes of a device that a plan may fill."""
    return int(device_memory * (1 - RESERVED))


def candidates(request: PlanRequest) -> list[Candidate]:
    """Every layout that the request leaves open, the cheapest first; those that do not fit come last.

    Raises:
        UserError: the request's mode, ZeRO stage and EP go together in no layout.
    """
    slots = request.slots or pack_slots(request.pool.tokens, request.cluster.world_size)
    owners = {ep: owners_of(slots, ep) for ep in _expert_parallel_sizes(request)}
    found = [_candidate(request, layout) for layout in _layouts(request, owners)]
    if not found:
        raise _impossible(request)
    return sorted(found, key=lambda c: (c.fits is False, c.cost))


def decide(request: PlanRequest) -> Candidate:
    """The layout that ``choose`` takes of all that the request leaves open."""
    return choose(candidates(request))


def choose(found: list[Candidate]) -> Candidate:
    """The cheapest that fits; where none fits, the one that needs least memory."""
    fitting = [candidate for candidate in found if candidate.fits is not False]
    if fitting:
        return min(fitting, key=lambda candidate: candidate.cost)
    return min(found, key=lambda candidate: candidate.peak)


def _expert_parallel_sizes(request: PlanRequest) -> list[int]:
    """1, and the divisors of W up to E that lie inside a node or fill whole ones."""
    world, node = request.cluster.world_size, request.cluster.ranks_per_node
    if request.expert_parallel_size is not None:
        if world % request.expert_parallel_size:
            raise UserError(
                f"{world} ranks do not divide into groups of {request.expert_parallel_size}",
                where="placement.expert_parallel_size",
                fix=f"write a divisor of {world}, or auto",
            )
        return sorted({1, request.expert_parallel_size})
    sizes = [size for size in range(1, world + 1) if world % size == 0 and size <= request.pool.num_experts]
    return [size for size in sizes if size == 1 or node % size == 0 or size % node == 0 or node > world]


def _layouts(request: PlanRequest, owners: dict[int, Owners]) -> Iterator[Layout]:
    asked = request.expert_parallel_size
    for mode in MODES if request.mode == "auto" else (request.mode,):
        for zero in ZERO_STAGES[mode]:
            if request.zero_stage not in (None, zero):
                continue
            for ep, own in owners.items():
                spread = ep > 1
                if spread == (mode == "tokens") and (asked is None or asked == ep):
                    yield Layout(mode, zero, own)


def _candidate(request: PlanRequest, layout: Layout) -> Candidate:
    memory = {stage.name: rank_bytes(request, layout, stage) for stage in request.stages}
    traffic = {stage.name: step_traffic(request, layout, stage) for stage in request.stages}
    device = request.cluster.device_memory
    seconds = [step_seconds(sent, layout, request.cluster) for sent in traffic.values()]
    return Candidate(
        layout=layout,
        memory=memory,
        traffic=traffic,
        fits=None if device is None else max(m.peak for m in memory.values()) <= usable_memory(device),
        seconds=None if None in seconds else sum(s for s in seconds if s is not None),
    )


def _impossible(request: PlanRequest) -> UserError:
    pairs = "; ".join(f"{mode} with {', '.join(map(str, stages))}" for mode, stages in ZERO_STAGES.items())
    asked = f"mode {request.mode}, ZeRO {'auto' if request.zero_stage is None else request.zero_stage}"
    if request.expert_parallel_size is not None:
        asked += f", expert_parallel_size {request.expert_parallel_size}"
    return UserError(
        f"no layout has {asked} on {request.cluster.world_size} ranks",
        where="placement",
        fix=f"write auto, or a pair of mode and ZeRO stage that go together: {pairs}; "
        "tokens needs at least two ranks and an expert_parallel_size above 1",
    )
