"""A placement plan as tables that a person can decide on."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dsmixer.placement.choice import Candidate, usable_memory
from dsmixer.placement.owners import Owners
from dsmixer.placement.plan import Plan
from dsmixer.placement.reason import amount

KINDS = (
    "base",
    "experts",
    "routers",
    "gradients",
    "optimizer",
    "activations",
    "buffers",
    "update",
    "start",
    "peak",
    "host",
)
HELP = {
    "optimizer": "moments, float32 copy, θ(0)",
    "buffers": "reduction, gathered weights, a mixer's work",
    "update": "optimizer step, instead of the two above",
    "start": "the most before the first step",
    "peak": "the most at any time",
    "host": "in the host's memory beside it",
}
SHOWN_RANKS = 8
SHOWN_LAYOUTS = 12


def print_plan(plan: Plan, console: Console) -> None:
    """Print the choice, its memory and traffic, the other layouts, and what else there is to know."""
    cluster, layout = plan.request.cluster, plan.chosen.layout
    edp = cluster.world_size // plan.expert_parallel_size
    pool = plan.request.pool
    ranks = "one rank" if cluster.world_size == 1 else f"{cluster.world_size} ranks"
    console.print(
        f"{pool.num_experts} experts of rank {pool.rank} on {ranks}: "
        f"[bold]{layout.mode}[/bold], ZeRO {layout.zero_stage}, "
        f"EP {plan.expert_parallel_size} x EDP {edp}: {_verdict(plan)}"
    )
    console.print(_memory(plan))
    console.print(_traffic(plan))
    console.print(_layouts(plan))
    if plan.expert_parallel_size > 1:
        console.print(_owners(plan, plan.chosen.owners))
    for label, text in (("why", plan.reason), ("exchange", plan.exchange)):
        console.print(f"[bold]{label}[/bold]: {text}", soft_wrap=True, highlight=False)
    for note in plan.notes:
        console.print(f"[bold]note[/bold]: {note}", soft_wrap=True, highlight=False)
    for line in plan.remedies:
        console.print(f"[bold]would fit[/bold]: {line}", soft_wrap=True, highlight=False)


def _verdict(plan: Plan) -> str:
    memory = plan.request.cluster.device_memory
    if memory is None:
        return f"{amount(plan.chosen.peak)} a rank at the peak (give --device-memory to see whether it fits)"
    word = "fits" if plan.chosen.fits else "[bold red]does not fit[/bold red]"
    return (
        f"{word}, {amount(plan.chosen.peak)} at the peak of {amount(usable_memory(memory))} a rank may fill"
    )


def _memory(plan: Plan) -> Table:
    table = Table(title="bytes on the fullest rank", title_justify="left")
    table.add_column("")
    for name in plan.chosen.memory:
        table.add_column(name, justify="right")
    table.add_column("")
    for kind in KINDS:
        values = [amount(memory.to_dict()[kind]) for memory in plan.chosen.memory.values()]
        table.add_row(kind, *values, HELP.get(kind, ""), style="bold" if kind == "peak" else None)
    return table


def _traffic(plan: Plan) -> Table:
    table = Table(title="bytes a rank sends in one optimizer step", title_justify="left")
    table.add_column("")
    for name in plan.chosen.traffic:
        table.add_column(name, justify="right")
    for kind in ("base", "weights", "tokens", "pairs", "gradients", "total"):
        sent = [amount(traffic.to_dict()[kind]) for traffic in plan.chosen.traffic.values()]
        table.add_row(kind, *sent, style="bold" if kind == "total" else None)
    return table


def _layouts(plan: Plan) -> Table:
    table = Table(title="the layouts there are, cheapest first", title_justify="left")
    for name in ("mode", "ZeRO", "EP", "peak", "sent a step", "fits"):
        table.add_column(name, justify="right" if name in ("ZeRO", "EP", "peak", "sent a step") else "left")
    shown = list(plan.candidates[:SHOWN_LAYOUTS])
    for mode in ("replicate", "weights", "tokens"):
        own = [candidate for candidate in plan.candidates if candidate.layout.mode == mode]
        shown += [c for c in own[:1] if c not in shown]
    for candidate in shown:
        _add_layout(table, candidate, chosen=candidate == plan.chosen)
    if len(shown) < len(plan.candidates):
        table.caption = f"{len(plan.candidates) - len(shown)} more with --json"
    return table


def _add_layout(table: Table, candidate: Candidate, *, chosen: bool) -> None:
    layout = candidate.layout
    fits = {None: "?", True: "yes", False: "no"}[candidate.fits]
    table.add_row(
        layout.mode + (" (chosen)" if chosen else ""),
        str(layout.zero_stage),
        str(layout.expert_parallel_size),
        amount(candidate.peak),
        amount(candidate.sent),
        fits,
        style="bold" if chosen else None,
    )


def _owners(plan: Plan, owners: Owners) -> Table:
    table = Table(title=f"owners, busiest over mean {owners.imbalance:.3f}", title_justify="left")
    for name in ("EP rank", "experts", "share of tokens", "which"):
        table.add_column(name, justify="left" if name == "which" else "right")
    total = sum(owners.loads) or 1.0
    for rank in range(min(len(owners.loads), SHOWN_RANKS)):
        held = owners.held(rank)
        names = ", ".join(plan.request.pool.name(e) for e in held[:4]) + (", …" if len(held) > 4 else "")
        table.add_row(str(rank), str(len(held)), f"{100 * owners.loads[rank] / total:.1f} %", names)
    if len(owners.loads) > SHOWN_RANKS:
        table.caption = f"{len(owners.loads) - SHOWN_RANKS} more EP ranks"
    return table
