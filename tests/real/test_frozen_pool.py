"""Five adapters by plain PEFT under trained routers: the short form of ``tests/bench/frozen_pool.py``.

Two minutes, so by hand: DSMIXER_LONG=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.launching import REPOSITORY, launch_environment

SHARED = REPOSITORY.parent / "shared"
NAMES = ["sst2", "qnli", "gsm8k", "mbpp", "arc_easy"]
WEIGHTS = "adapter_model.safetensors"

pytestmark = [
    pytest.mark.skipif(os.environ.get("DSMIXER_LONG") != "1", reason="long: DSMIXER_LONG=1"),
    pytest.mark.skipif(
        not (SHARED / "data").is_dir() or not (SHARED / "models").is_dir(),
        reason="the real benchmarks and models are not beside the checkout",
    ),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen_pool")
    command = [sys.executable, "-m", "tests.bench.frozen_pool", "--short", "--ranks", "1"]
    done = subprocess.run(
        [*command, "--shared", str(SHARED), "--out", str(folder)],
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return folder


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "frozen_pool.json").read_text(encoding="utf-8"))


def test_every_imported_adapter_has_the_loss_that_peft_gives_it(result: dict[str, Any]) -> None:
    assert result["expert_difference"] < 1e-5 and result["base_difference"] < 1e-6
    alone = [result["alone_in_peft"][name][name] for name in NAMES]
    assert all(
        abs(own - base) > 1e-3 for own, base in zip(alone, result["base_in_peft"].values(), strict=True)
    )


def test_every_method_answers_every_benchmark(result: dict[str, Any]) -> None:
    methods = ["base", *(f"expert:{name}" for name in NAMES), "uniform", "mixture", "arrow"]
    losses = {(row["method"], row["domain"]) for row in result["rows"] if row["metric"] == "loss"}
    assert losses == {(method, name) for method in methods for name in NAMES}
    assert "rank mismatch" in result["arrow_refuses"]


def test_routers_get_gradients_and_frozen_adapters_come_out_as_they_went_in(out: Path) -> None:
    mixture = out / "runs" / "routers" / "mixture"
    for name in NAMES:
        before = load_file(out / "adapters" / name / WEIGHTS)
        after = load_file(mixture / "experts" / name / WEIGHTS)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    metrics = (out / "runs" / "routers" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["stage"] == 2 and json.loads(line)["grad_norm"] > 0 for line in metrics)
