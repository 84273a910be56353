"""The files that a comparison's finished cells leave, without a run."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dsmixer.compare.plan import Cell
from dsmixer.config.recipe import dump_recipe


def loss(domain: str, method: str, value: float) -> dict[str, Any]:
    return {"domain": domain, "method": method, "metric": "loss", "value": value, "num_examples": 5}


def finish(cell: Cell, rows: list[dict[str, Any]]) -> None:
    """The files of a finished run, as training leaves them."""
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(dump_recipe(cell.recipe.recipe))
    own = {"law": "lawyer"}
    (cell.folder / "evaluation.json").write_text(json.dumps({"rows": rows, "own_experts": own}))
    steps = [
        {
            "stage": 2,
            "step": step,
            "seconds": seconds,
            "tokens_per_second": 10.0 * step,
            "load_variance": 1.0 / step,
        }
        for step, seconds in ((2, 0.5), (4, 1.0), (6, 3.0))
    ]
    (cell.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + '\n{"stage": 2, "st')
    summary = {
        "entropy": 0.25,
        "own_first_mean": 0.5,
        "own_first_later_layers_mean": 0.75,
        "ln_experts": math.log(2),
    }
    routing = {"routers": ["a.0.q", "a.0.k"], "entropy": [0.1, 0.4], "summary": summary}
    (cell.folder / "routing.json").write_text(json.dumps(routing))
    expert = cell.folder / "mixture" / "experts" / "law"
    expert.mkdir(parents=True)
    save_file(
        {"a": np.zeros((2, 5), np.float32), "b": np.zeros(3, np.float32)},
        expert / "adapter_model.safetensors",
    )
    save_file({"r": np.zeros((2, 4), np.float32)}, cell.folder / "mixture" / "routers.safetensors")
    (cell.folder / ".finished").write_text("done\n")
