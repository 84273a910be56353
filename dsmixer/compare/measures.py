"""Figures of a run as a whole, from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from safetensors import safe_open

from dsmixer.compare.plan import ANSWERING, Cell
from dsmixer.compare.running import read_usage

METHOD_COSTS = {"trainable": "trainable", "seconds": "seconds", ANSWERING: ANSWERING}
"""Measures of another method, and what its costs call them."""


def measures_of(cell: Cell, log: Path) -> dict[str, float]:
    """The measures of a finished run by name; one that it does not have is left out.

    * ``routing_entropy``: of a held-out token's p, mean over routers, nats.
    * ``own_first``: share of held-out tokens that put their own expert first, mean of domains and of the
      layers after the first, or of all where there is one layer.
    * ``load_variance``: variance over experts of E f, mean over the last tenth of the logged steps.
    * ``seconds``: in optimizer steps. ``seconds_per_step``, ``tokens_per_second``: medians of the last stage.
    * ``trainable``: weights that train in this run.
    * ``peak_memory``: bytes; what the steps logged of the device, else resident memory of the process.

    Args:
        cell: a run that is finished.
        log: of its process, beside which its resident memory was noted.
    """
    rows = list(metrics_rows(cell.folder / "metrics.jsonl"))
    found = {**_routing(cell), **_steps(rows), **_trainable(cell)}
    logged = numbers(rows, "peak_memory")
    found["peak_memory"] = max(logged) if logged else read_usage(log)["peak_bytes"] or math.nan
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _routing(cell: Cell) -> dict[str, float]:
    path = cell.folder / "routing.json"
    if cell.kind == "experts" or not path.is_file():
        return {}
    summary = json.loads(path.read_text(encoding="utf-8")).get("summary") or {}
    own = summary.get("own_first_later_layers_mean")
    values = {
        "routing_entropy": summary.get("entropy"),
        "own_first": summary.get("own_first_mean") if own is None else own,
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def _steps(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of all stages together, and of the last one."""
    if not rows:
        return {}
    stages = sorted({row["stage"] for row in rows})
    seconds = 0.0
    for stage in stages:
        own = [row for row in rows if row["stage"] == stage]
        seconds += fmean(numbers(own, "seconds") or [math.nan]) * own[-1]["step"]
    last = [row for row in rows if row["stage"] == stages[-1]]
    end = last[-max(1, len(last) // 10) :]
    return {
        "seconds": seconds,
        "seconds_per_step": median(numbers(last, "seconds") or [math.nan]),
        "tokens_per_second": median(numbers(last, "tokens_per_second") or [math.nan]),
        "load_variance": fmean(numbers(end, "load_variance") or [math.nan]),
    }


def _trainable(cell: Cell) -> dict[str, float]:
    """Experts, where they train, and routers, where they do, counted in the published mixture."""
    assert cell.recipe is not None
    recipe, mixture = cell.recipe.recipe, cell.folder / "mixture"
    count = 0
    if recipe.stage1.enabled or recipe.stage2.experts == "preserve":
        count += sum(num_weights(path) for path in sorted(mixture.glob("experts/*/*.safetensors")))
    if recipe.stage2.enabled:
        count += num_weights(mixture / "routers.safetensors")
    return {"trainable": float(count)} if count else {}


def num_weights(path: Path) -> int:
    """Numbers in a safetensors file, by its header alone."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118


def numbers(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The values of a key that are there and finite."""
    values = [row.get(key) for row in rows]
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def metrics_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of ``metrics.jsonl``, without a last one that is cut short."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
