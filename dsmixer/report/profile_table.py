"""The parts of a training step as a table: what ``dsmixer train --profile`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from dsmixer.report.text import percent, readable

HELP = {
    "base": "the frozen model and the loss, forward and backward",
    "mixers": "the experts' products, forward and backward",
    "router": "logits, choice, statistics, routing loss",
    "exchange": "weights, gradients and tokens between ranks",
    "optimizer": "preserve term, norms, clipping, update",
    "data": "waiting for the batch, and copying it to the device",
    "loop": "everything else: logs, checks, checkpoints",
}


def profile_table(stage: int, found: Mapping[str, Any]) -> Table:
    """The table of one stage.

    Args:
        stage: 1 or 2.
        found: its entry of ``profile.json``.
    """
    table = Table(title=_title(stage, found), title_justify="left", caption_justify="left")
    by_rank = found["by_rank"]
    table.add_column("part")
    for name in ("seconds a step", "median", "share", "calls", *_rank_columns(by_rank)):
        table.add_column(name, justify="right")
    table.add_column("")
    for part, figures in found["parts"].items():
        table.add_row(
            part,
            readable(float(figures["seconds"])),
            readable(float(figures["median_seconds"])),
            percent(figures["share"]),
            readable(float(figures["calls"])),
            *_over_ranks(by_rank, part),
            HELP[part],
        )
    table.add_section()
    whole = (readable(float(found[name])) for name in ("seconds", "median_seconds"))
    table.add_row("step", *whole, percent(1.0), "", *_over_ranks(by_rank, "seconds"), "", style="bold")
    table.caption = _caption(found)
    return table


def _title(stage: int, found: Mapping[str, Any]) -> str:
    first, last = found["first_step"], found["last_step"]
    which = f"step {first}" if first == last else f"steps {first} to {last}"
    ranks = "" if found["ranks"] == 1 else f", rank 0 of {found['ranks']}"
    return f"profile of stage {stage}: {which}{ranks} ({found['device']}, ZeRO {found['zero_stage']})"


def _caption(found: Mapping[str, Any]) -> str:
    parts = found["parts"]
    around = parts["loop"]["share"] + parts["data"]["share"]
    text = f"loop and data take {percent(around)} of a step"
    if found["saving_seconds"] > 0:
        saving = found["saving_seconds"] / found["seconds"]
        text += f", {percent(saving)} for the checkpoints that fell in these steps"
    return text


def _rank_columns(by_rank: list[Mapping[str, float]]) -> tuple[str, ...]:
    return ("least (rank)", "most (rank)") if len(by_rank) > 1 else ()


def _over_ranks(by_rank: list[Mapping[str, float]], part: str) -> tuple[str, ...]:
    """The least and the most that a rank took, with its number."""
    if len(by_rank) == 1:
        return ()
    seconds = [figures[part] for figures in by_rank]
    ends = (min(seconds), max(seconds))
    return tuple(f"{readable(end)} ({seconds.index(end)})" for end in ends)
