"""One rank of ``dist/test_traffic.py``: real runs, and every collective that goes out in their steps.

Collectives are seen where torch hands them to the backend, as ``c10d`` operators, so that it does not matter
who calls them by which name; ``counted`` holds their number against the backend's own count.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dsmixer.config.checks import check_recipe
from dsmixer.config.ds_json import merge_ds_config
from dsmixer.config.recipe import load_recipe
from dsmixer.data.collate import MicroBatch
from dsmixer.experts.assignment import Assignment
from dsmixer.model.load import LoadedBase
from dsmixer.placement.exchange import Dispatched, TokenExchange, token_placement
from dsmixer.placement.groups import expert_parallel_group
from dsmixer.placement.layout import ExpertLayout
from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training import run as run_module
from dsmixer.training import stage_run
from dsmixer.training.engine import StageEngine
from dsmixer.training.loop import Loop, StepReport
from dsmixer.training.run import RunRequest, train
from dsmixer.training.run_state import RunState

RANKS = 4
EVEN_TOKENS, EVEN_WIDTH = 6000, 3
EVEN: dict[str, tuple[tuple[tuple[int, ...], ...], int]] = {
    "eight_on_four_k2": (((0, 1), (2, 3), (4, 5), (6, 7)), 2),
    "eight_on_two_k3": (((0, 1, 2, 3), (4, 5, 6, 7)), 3),
    "five_unevenly_k2": (((0, 1), (2,), (3,), (4,)), 2),
    "two_with_several_owners_k2": (((0, 4), (1, 4), (2, 5), (3, 5)), 2),
    "one_on_every_rank_k3": (((0, 4), (1, 4), (2, 4), (3, 4)), 3),
}
"""Experts of each rank of a group, and K."""


@dataclass(frozen=True)
class Call:
    """One collective.

    Attributes:
        phase: of the step.
        kind: its operator in ``torch.ops.c10d``.
        ranks: of its group.
        sent: bytes that this rank sends to others, as a ring does it; an all-to-all's exactly.
        numel: elements of the whole tensor: gathered, or before it is scattered.
        dtype: of them.
    """

    phase: str
    kind: str
    ranks: int
    sent: float
    numel: int
    dtype: str


def sent_bytes(kind: str, tensors: list[torch.Tensor], splits: list[int], group: dist.ProcessGroup) -> float:
    """What a rank of a ring sends; ``tensors``: all that is gathered, reduced, scattered or given away."""
    ranks, whole = group.size(), sum(t.numel() * t.element_size() for t in tensors)
    if kind == "alltoall_base_":
        rows = splits or [tensors[0].shape[0] // ranks] * ranks
        away = sum(rows) - rows[group.rank()]
        return away * math.prod(tensors[0].shape[1:]) * tensors[0].element_size()
    return whole * (2 if kind == "allreduce_" else 1) * (ranks - 1) / ranks


class Recorder(TorchDispatchMode):
    """Sees every collective on its way to the backend, and lets it pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.groups: Counter[str] = Counter()
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "c10d":
            self._record(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _record(self, kind: str, args: tuple[Any, ...]) -> None:
        group = next(g for a in args if (g := _group(a)) is not None)
        whole = {"reduce_scatter_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1}.get(kind, 0)
        tensors = list(_tensors(args[whole]))
        splits = list(args[4]) if kind == "alltoall_base_" else []
        numel = sum(t.numel() for t in tensors)
        sent = sent_bytes(kind, tensors, splits, group)
        self.calls.append(Call(self.phase, kind, group.size(), sent, numel, str(tensors[0].dtype)))
        self.groups[group.group_name] += 1


def _group(value: object) -> dist.ProcessGroup | None:
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):  # type: ignore[attr-defined]
        return dist.ProcessGroup.unbox(value)  # type: ignore[arg-type]
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for one in value:
            yield from _tensors(one)


def counted(groups: list[dist.ProcessGroup]) -> dict[str, int]:
    """Collectives that each group's backend has counted so far."""
    return {g.group_name: g._get_sequence_number_for_group() for g in groups}


class Wire:
    """What one run sends: its collectives step by step, and the copies that its exchange had to make.

    Attributes:
        steps: for each stage and step, the calls and the dispatches.
        missed: groups whose backend counted other collectives than were seen.
    """

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.steps: dict[str, list[dict[str, Any]]] = {"stage1": [], "stage2": []}
        self.missed: dict[str, Any] = {}
        self.dispatches: list[dict[str, Any]] = []
        self.micro_batches = 0
        self.plan: Any = None
        self.layout: ExpertLayout | None = None

    def step(self, number: int, run: Any) -> StepReport:
        """Run a step and keep what went out."""
        groups = list(dist.distributed_c10d._world.pg_map)
        self.recorder = Recorder()
        self.dispatches, self.micro_batches = [], 0
        before = counted(groups)
        with self.recorder:
            report: StepReport = run()
        after = counted(groups)
        seen = {name: self.recorder.groups[name] for name in after}
        rose = {name: after[name] - before[name] for name in after}
        if seen != rose:
            self.missed[f"stage{number} step {len(self.steps)}"] = (seen, rose)
        calls = [asdict(call) for call in self.recorder.calls]
        self.steps[f"stage{number}"].append({"calls": calls, "dispatches": self.dispatches})
        return report


wire = Wire()


class RecordedLoop(Loop):
    """Names the phases of a step."""

    def run_step(self, step: int) -> StepReport:
        return wire.step(self.stage.number, lambda: Loop.run_step(self, step))

    def _forward_backward(
        self, micro: MicroBatch, statistics: RoutingStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wire.recorder.phase = f"micro-batch {wire.micro_batches}"
        wire.micro_batches += 1
        sums = Loop._forward_backward(self, micro, statistics)
        wire.recorder.phase = "between"
        return sums

    def _reduce(self, sums: torch.Tensor, statistics: RoutingStatistics | None) -> tuple[float, float, float]:
        wire.recorder.phase = "losses"
        return Loop._reduce(self, sums, statistics)

    def _update(self, step: int, statistics: RoutingStatistics | None) -> Any:
        wire.recorder.phase = "update"
        prepared = Loop._update(self, step, statistics)
        wire.recorder.phase = "step"
        return prepared


def count_copies(exchange: TokenExchange, x_TD: torch.Tensor, assignment: Assignment) -> Dispatched:
    """``TokenExchange.dispatch``, with a count of the ranks that hold a token's experts before it."""
    sent = real_dispatch(exchange, x_TD, assignment)
    if assignment.here or torch._C._current_graph_task_id() != -1:  # the second: a layer is run again
        return sent
    assert wire.layout is not None
    copies, every = [0] * wire.layout.size, list(range(assignment.num_experts))
    chosen = [every] * x_TD.shape[0] if assignment.indices_TK is None else assignment.indices_TK.tolist()
    for experts in chosen:
        for owner in {_owner(wire.layout, expert) for expert in experts}:
            copies[owner] += 1
    wire.dispatches.append({"tokens": x_TD.shape[0], "width": x_TD.shape[1], "copies": copies})
    return sent


real_dispatch = TokenExchange.dispatch


def _owner(layout: ExpertLayout, expert: int) -> int:
    """Itself, or else one of the expert's owners by this rank's number."""
    owners = [rank for rank, experts in enumerate(layout.owned) if expert in experts]
    return layout.rank if layout.rank in owners else owners[layout.rank % len(owners)]


@contextmanager
def recorded_runs() -> Iterator[None]:
    """Let ``train`` keep its plan and layout, run the recorded loop, and end without a report."""
    real_place, real_finish, real_loop = run_module.place_experts, run_module.finish_run, stage_run.Loop

    def place(plan: Any, world: Any) -> Any:
        placement = real_place(plan, world)
        wire.plan, wire.layout = plan, placement.layout
        return placement

    def finish(state: RunState, base: LoadedBase, engine: StageEngine) -> None:
        engine.release()

    run_module.place_experts, run_module.finish_run = place, finish
    stage_run.Loop = RecordedLoop  # type: ignore[misc]
    TokenExchange.dispatch = count_copies  # type: ignore[method-assign]
    try:
        yield
    finally:
        run_module.place_experts, run_module.finish_run = real_place, real_finish
        stage_run.Loop = real_loop  # type: ignore[misc]
        TokenExchange.dispatch = real_dispatch  # type: ignore[method-assign]


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One run of both stages."""
    global wire
    wire = Wire()
    loaded = load_recipe(case["recipe"], [*case["overrides"], f"run.name={case['name']}"])
    loaded, _ = merge_ds_config(loaded)
    check_recipe(loaded)
    unset_hf_deepspeed_config()
    with recorded_runs():
        train(RunRequest(loaded, tuple(case.get("stages", (1, 2)))))
    gc.collect()
    assert wire.layout is not None
    return {"steps": wire.steps, "missed": wire.missed, "owned": wire.layout.owned, "plan": wire.plan}


def run_even(owned: tuple[tuple[int, ...], ...], top_k: int) -> list[dict[str, Any]]:
    """One dispatch of tokens that choose their experts evenly."""
    rank, size = dist.get_rank(), len(owned)
    num_experts = 1 + max(e for experts in owned for e in experts)
    draw = torch.Generator().manual_seed(rank)
    order_TE = torch.rand(EVEN_TOKENS, num_experts, generator=draw).argsort(1)
    pairs = Assignment(num_experts, indices_TK=order_TE[:, :top_k], weights_TK=torch.ones(EVEN_TOKENS, top_k))
    exchange = token_placement(
        ExpertLayout(owned, rank % size), expert_parallel_group(size), torch.device("cpu")
    ).exchange
    recorder = Recorder()
    with recorder:
        sent = exchange.dispatch(torch.ones(EVEN_TOKENS, EVEN_WIDTH), pairs)
        exchange.combine(sent.x_MD, sent)
    return [asdict(call) for call in recorder.calls]


def main(cases: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is never garbage
    found = {}
    for case in json.loads(cases.read_text()):
        print(f"case {case['name']}", flush=True)
        found[case["name"]] = run_case(case)
        torch.save(found, cases.parent / f"rank-{dist.get_rank()}.pt")
    found["even"] = {name: run_even(*even) for name, even in EVEN.items()}
    torch.save(found, cases.parent / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # the launcher puts --local_rank before the arguments
    main(Path(sys.argv[-1]))
