"""What the finished cells of a comparison have measured, as plain rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmixer.compare.measures import METHOD_COSTS, measures_of
from dsmixer.compare.plan import ANSWERING, Cell, Plan
from dsmixer.compare.running import read_usage
from dsmixer.compare.state import method_file, state_of
from dsmixer.config.errors import UserError

Row = dict[str, Any]
References = dict[tuple[str, int, str], dict[str, float]]

BASE, OWN, MAJORITY, MIXTURE = "base", "own", "majority", "mixture"
STAGE_ONE = "@stage1"


@dataclass
class Gathered:
    """All figures of a comparison.

    Attributes:
        rows: variant (or None), trunk, seed, cell, domain, method, metric, value, num_examples.
        measures: variant (or None), trunk, seed, method, name, value.
        references: by trunk, seed and domain, the ``base`` and ``own`` loss: the own expert as stage one left
            it.
        own_experts: by trunk and domain, the name of the expert.
        told: trunk and name of the other methods that are told the domain of what they answer.
        missing: names of cells that are not done, or have figures that are not finite.
    """

    rows: list[Row] = field(default_factory=list)
    measures: list[Row] = field(default_factory=list)
    references: References = field(default_factory=dict)
    own_experts: dict[tuple[str, str], str] = field(default_factory=dict)
    told: set[tuple[str, str]] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)


def gather(plan: Plan) -> Gathered:
    """Read all cells that are done.

    Raises:
        UserError: a file of one is damaged.
    """
    found = Gathered()
    for cell in plan.cells:
        if state_of(plan, cell) != "done":
            found.missing.append(cell.name)
            continue
        path = method_file(plan, cell) if cell.kind == "method" else cell.folder / "evaluation.json"
        result = read_json(path)
        common = {
            "variant": cell.label if cell.kind == "variant" else cell.times,
            "trunk": cell.trunk,
            "seed": cell.seed,
            "cell": cell.kind,
        }
        rows = result.get("rows", []) if cell.times is None else []  # its own run has scored it
        own = [{**common, **row} for row in rows if math.isfinite(float(row["value"]))]
        if len(own) < len(rows):
            found.missing.append(f"{cell.name} ({len(rows) - len(own)} of its figures are not finite)")
        found.rows += own
        for domain, expert in (result.get("own_experts") or {}).items():
            found.own_experts[cell.trunk, domain] = expert
        costs = (result.get("costs") or {}) if cell.kind == "method" else {}
        found.told |= {(cell.trunk, method) for method, cost in costs.items() if cost.get("told")}
        found.measures += [{**common, **row} for row in _measures(plan, cell, result)]
        if cell.kind != "method":
            _refer(found, cell, own)
    return found


def _measures(plan: Plan, cell: Cell, result: Mapping[str, Any]) -> Iterator[Row]:
    if cell.kind == "method":
        for method, cost in (result.get("costs") or {}).items():
            for name, key in METHOD_COSTS.items() if cell.times is None else [(ANSWERING, ANSWERING)]:
                if cost.get(key) is not None:
                    yield {"method": method, "name": name, "value": float(cost[key])}
            if cell.times is not None:
                continue
            memory = cost.get("peak_memory") or read_usage(plan.log(cell))["peak_bytes"]
            if memory:
                yield {"method": method, "name": "peak_memory", "value": float(memory)}
        return
    method = OWN if cell.kind == "experts" else MIXTURE
    for name, value in measures_of(cell, plan.log(cell)).items():
        yield {"method": method, "name": name, "value": value}


def _refer(found: Gathered, cell: Cell, rows: list[Row]) -> None:
    """Note the losses of the base and of each domain's own expert, of the first cell that has them."""
    loss = {(row["domain"], row["method"]): float(row["value"]) for row in rows if row["metric"] == "loss"}
    for domain in dict.fromkeys(domain for domain, _ in loss):
        expert = f"expert:{found.own_experts.get((cell.trunk, domain), domain)}"
        base = loss.get((domain, BASE))
        own = loss.get((domain, f"{expert}{STAGE_ONE}"), loss.get((domain, expert)))
        if base is not None and own is not None:
            found.references.setdefault((cell.trunk, cell.seed, domain), {BASE: base, OWN: own})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fix = "remove the cell's folder, to have it made anew"
        raise UserError(f"malformed JSON: {error}", where=str(path), fix=fix) from error
    return value if isinstance(value, dict) else {}
