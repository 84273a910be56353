"""``results.json``: every row of a comparison, its table with means and spread, and what its plots need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsmixer.checkpoint.atomic import write_json
from dsmixer.compare.curves import curves_of
from dsmixer.compare.gather import Gathered, gather
from dsmixer.compare.plan import Plan
from dsmixer.compare.statistics import MEAN, Figure, TableRow, as_figures, table_rows
from dsmixer.compare.variants import value_text

RESULTS_FILE = "results.json"
OF_SEEDS = "comparison.seeds="


def write_results(plan: Plan) -> dict[str, Any]:
    """Gather what is there, write ``results.json``, and answer with what is in it."""
    results = results_of(plan, gather(plan))
    write_json(plan.folder / RESULTS_FILE, results)
    return results


def results_of(plan: Plan, gathered: Gathered) -> dict[str, Any]:
    """A comparison as plain JSON values.

    Returns:
        ``name``, ``title``, ``source``, ``note``, ``scale``, ``seeds``, ``overrides``, ``only``,
        ``variants``, ``axes``, ``columns``, ``measure_names``, ``plots`` and ``paper`` of the file and of how
        it was called; ``settings`` of each variant; ``cells``, how
        many there are, and those ``missing``; ``rows`` and ``measures`` of single seeds; ``domains`` and
        ``table``, a list of rows whose ``cells`` are by metric and domain and whose ``measures`` are by name,
        each with mean, spread and the values of the seeds; ``curves``.
    """
    comparison = plan.loaded.comparison
    told = comparison.model_dump(mode="json", include={"name", "title", "source", "note", "plots", "paper"})
    return {
        **told,
        "scale": plan.loaded.scale,
        "file": str(plan.loaded.path),
        "base": str((plan.loaded.raw.get("base") or {}).get("model")),
        "seeds": list(plan.seeds),
        "overrides": [text for text in plan.loaded.overrides if not text.startswith(OF_SEEDS)],
        "only": list(plan.only),
        "variants": [variant.label for variant in plan.variants],
        "settings": {
            variant.label: {change.key: change.value for change in variant.changes}
            for variant in plan.variants
        },
        "axes": [
            {"name": axis.name, "key": axis.key, "values": [value_text(v) for v in axis.values]}
            for axis in comparison.axes
        ],
        "columns": list(comparison.columns),
        "measure_names": list(comparison.measures),
        "cells": len(plan.cells),
        "missing": gathered.missing,
        "domains": _domains(gathered),
        "mean": MEAN,
        "table": [_table_row(row) for row in table_rows(plan, gathered)],
        "curves": curves_of(plan),
        "rows": gathered.rows,
        "measures": gathered.measures,
    }


def _domains(gathered: Gathered) -> list[str]:
    """In the order in which the base was scored; the rows of majority classes do not have all of them."""
    scored = [row for row in gathered.rows if row["metric"] == "loss"]
    return list(dict.fromkeys(row["domain"] for row in (*scored, *gathered.rows)))


def _table_row(row: TableRow) -> dict[str, Any]:
    cells: dict[str, dict[str, Any]] = {}
    for (metric, domain), figure in as_figures(row.values).items():
        cells.setdefault(metric, {})[domain] = _figure(figure)
    return {
        "row": row.label,
        "kind": row.kind,
        "variant": row.variant,
        "trunk": row.trunk,
        "method": row.method,
        "name": row.name,
        "point": {name: value_text(value) for name, value in row.point},
        "cells": cells,
        "measures": {name: _figure(figure) for name, figure in as_figures(row.measures).items()},
    }


def _figure(figure: Figure) -> Mapping[str, Any]:
    values = {str(seed): value for seed, value in figure.values.items()}
    return {"mean": figure.mean, "spread": figure.spread, "spread_is": figure.spread_is, "values": values}
