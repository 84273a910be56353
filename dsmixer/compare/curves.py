"""What the plots of a comparison show beside its table: expert load, entropy by layer, the routing loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dsmixer.compare.gather import read_json
from dsmixer.compare.measures import metrics_rows
from dsmixer.compare.plan import Cell, Plan
from dsmixer.compare.state import state_of
from dsmixer.config.outline import layer_name, short_layer_name

Curve = dict[str, Any]


def curves_of(plan: Plan) -> dict[str, dict[str, Curve]]:
    """What the comparison's plots ask for, by plot and label of the variant; means over its finished seeds.

    * ``loads``: ``domains``, ``experts`` and ``load [G][E]``, the share of a domain's held-out tokens whose
      first choice is the expert, mean over routers.
    * ``entropy``: ``layers``, ``values`` (nats, held-out tokens, mean over a layer's routers), ``limit``,
      which is ln E.
    * ``losses``: ``steps`` and ``values`` of the routing loss as it enters the loss of stage two.
    """
    wanted = plan.loaded.comparison.plots
    found: dict[str, dict[str, Curve]] = {}
    for kind, make in (("loads", _loads), ("entropy", _entropy), ("losses", _losses)):
        if kind in wanted:
            for variant in plan.variants:
                folders = [cell.folder for cell in _done(plan, variant.label)]
                curve = make(folders)
                if curve:
                    found.setdefault(kind, {})[variant.label] = curve
    return found


def _done(plan: Plan, label: str) -> Iterable[Cell]:
    own = (cell for cell in plan.cells if cell.kind == "variant" and cell.label == label)
    return [cell for cell in own if state_of(plan, cell) == "done"]


def _routing(folders: Sequence[Path], key: str) -> list[dict[str, Any]]:
    """The routing of runs that have the same routers, domains and experts as the first of them."""
    read = [read_json(folder / "routing.json") for folder in folders]
    with_key = [routing for routing in read if routing.get(key)]
    names = ("routers", "experts", "domains")
    return [r for r in with_key if all(r.get(n) == with_key[0].get(n) for n in names)]


def _loads(folders: Sequence[Path]) -> Curve:
    routings = _routing(folders, "load")
    if not routings:
        return {}
    domains, experts = routings[0]["domains"], routings[0]["experts"]
    load = [
        [
            _mean(of_router[g][e] for routing in routings for of_router in routing["load"])
            for e in range(len(experts))
        ]
        for g in range(len(domains))
    ]
    return {"domains": domains, "experts": experts, "load": load}


def _entropy(folders: Sequence[Path]) -> Curve:
    routings = _routing(folders, "entropy")
    if not routings:
        return {}
    layers: dict[str, list[int]] = {}
    for index, router in enumerate(routings[0]["routers"]):
        layers.setdefault(short_layer_name(layer_name(router)), []).append(index)
    values = [
        _mean(routing["entropy"][index] for routing in routings for index in indices)
        for indices in layers.values()
    ]
    return {"layers": list(layers), "values": values, "limit": routings[0]["summary"]["ln_experts"]}


def _losses(folders: Sequence[Path]) -> Curve:
    by_step: dict[int, list[float]] = {}
    for folder in folders:
        for row in metrics_rows(folder / "metrics.jsonl"):
            if row["stage"] == 2 and row.get("rsl") is not None:
                by_step.setdefault(row["step"], []).append(float(row["rsl"]))
    steps = sorted(by_step)
    return {"steps": steps, "values": [fmean(by_step[step]) for step in steps]} if steps else {}


def _mean(values: Iterable[float | None]) -> float | None:
    """Of what is a number; None where nothing is."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if known else None
