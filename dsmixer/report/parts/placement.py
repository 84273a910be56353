"""Where the experts were, and what a rank was to hold and to send."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dsmixer.report.frames import cells, definitions, note, section, table
from dsmixer.report.html import Markup, join, tag
from dsmixer.report.run_folder import RunFolder, numbers
from dsmixer.report.text import MISSING, amount, readable

KINDS = {
    "base": "base model",
    "experts": "experts",
    "routers": "routers",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "buffers": "buffers",
    "update": "optimizer step, instead of the two above",
    "start": "before the first step, at most",
    "peak": "peak, at any time",
    "host": "on the host beside it",
}
SENT = ("base", "weights", "tokens", "pairs", "gradients", "total")
MAX_PLACES = 16
PEAK = "peak_memory"  # bytes that tensors took on the device of rank 0; no row on a CPU has it


def placement(run: RunFolder) -> Markup:
    """The plan's choice and its reason, memory by kind and stage, traffic, and the owners of experts."""
    plan = run.plan
    parts = [definitions(_choice(plan)), _memory(run), _traffic(plan), _places(plan)]
    return section("Placement and memory", *(part for part in parts if part), key="placement")


def _choice(plan: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    names = {
        "mode": "Mode",
        "zero_stage": "ZeRO stage",
        "world_size": "Ranks",
        "expert_parallel_size": "Expert parallel size",
        "expert_data_parallel_size": "Owners of each expert",
        "num_experts": "Experts",
        "device_memory": "Memory of a device",
        "fits": "Fits",
        "reason": "Why",
        "exchange": "Exchange",
    }
    for key, name in names.items():
        value = plan.get(key)
        if value is not None:
            yield name, amount(value) if key == "device_memory" else readable(value)
    notes = plan.get("notes")
    yield from (("Note", text) for text in (notes if isinstance(notes, list) else ()))


def _stages(plan: Mapping[str, Any], key: str) -> dict[str, dict[str, float]]:
    """Bytes by stage and kind; empty where the plan has none, or another form."""
    found = plan.get(key)
    stages = found if isinstance(found, Mapping) else {}
    return {
        str(stage): {str(kind): float(value) for kind, value in of.items() if isinstance(value, int | float)}
        for stage, of in stages.items()
        if isinstance(of, Mapping)
    }


def _memory(run: RunFolder) -> Markup:
    stages = _stages(run.plan, "bytes_per_rank")
    if not stages:
        return Markup("")
    most = max((value for of in stages.values() for value in of.values()), default=0) or 1
    rows = []
    for kind, name in KINDS.items():
        if any(of.get(kind) for of in stages.values()):
            bars = [_bar(of.get(kind), most) for of in stages.values()]
            rows.append(
                tag("tr", tag("th", name, scope="row"), *bars, class_="mean" if kind == "peak" else None)
            )
    measured = {stage: numbers(run.metrics.get(_number(stage), []), PEAK) for stage in stages}
    if any(values.size for values in measured.values()):
        bars = [_bar(float(np.max(v)) if v.size else None, most) for v in measured.values()]
        rows.append(tag("tr", tag("th", "peak, measured", scope="row"), *bars, class_="mean"))
        remark = (
            "Predicted before the run, of the fullest rank; measured by the allocator of rank 0's device."
        )
    else:
        remark = "Predicted before the run, of the fullest rank; no peak was measured."
    columns = ["kind", *(stage.replace("stage", "stage ") for stage in stages)]
    return join(tag("h3", "Memory of a rank"), table(columns, rows), note(remark))


def _number(stage: str) -> int:
    digits = stage.removeprefix("stage")
    return int(digits) if digits.isdigit() else 0


def _bar(value: float | None, most: float) -> Markup:
    """A number over a bar of its length."""
    if value is None:
        return tag("td", MISSING, class_="number")
    bar = tag("span", class_="bar", style=f"--w:{min(1.0, value / most):.3f}")
    return tag("td", amount(value), bar, class_="number")


def _traffic(plan: Mapping[str, Any]) -> Markup:
    stages = _stages(plan, "bytes_sent_per_step")
    rows = [
        cells([kind, *(amount(of.get(kind, 0.0)) for of in stages.values())])
        for kind in SENT
        if any(of.get(kind) for of in stages.values())
    ]
    if not rows:
        return Markup("")
    columns = ["kind", *(stage.replace("stage", "stage ") for stage in stages)]
    return join(tag("h3", "Sent by a rank in one step"), table(columns, rows))


def _places(plan: Mapping[str, Any]) -> Markup:
    found = plan.get("places")
    places = [place for place in found if isinstance(place, Mapping)] if isinstance(found, list) else []
    if len(places) < 2:
        return Markup("")
    rows = [
        cells([str(place.get("ep_rank")), place.get("experts"), place.get("load_over_mean")])
        for place in places[:MAX_PLACES]
    ]
    left = len(places) - len(rows)
    title = tag("h3", "Owners of experts")
    owners = table(["expert-parallel rank", "experts", "load over mean"], rows)
    return join(title, owners, note(f"{left} more in plan.json") if left else "")
