"""What only a GPU can show of a run in little memory; skipped, saying so, where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsmixer.placement.layout import everything_here
from dsmixer.placement.pieces import Piece, Shard
from dsmixer.training.moments import KINDS, Keep, Moments, zeros
from dsmixer.training.rows import spans_of, stacked

BENCH = Path(__file__).parents[1] / "bench" / "low_memory.py"
MARKS = {"preserve": 15e9, "preserve, 8-bit": 12e9, "frozen": 8e9}
"""Bytes that LLaMA3-8B in NF4 with six experts of rank 64 may take at the peak."""
WITHIN = 0.05
NEEDED = 20e9

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    if torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip(f"less than {NEEDED / 1e9:.0f} GB of GPU memory are free")
    path = tmp_path_factory.mktemp("low_memory") / "figures.json"
    command = [sys.executable, str(BENCH), "--shape", "llama3_8b", "--base", "nf4", "--json", str(path)]
    folders = os.pathsep.join([str(BENCH.parents[2]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": folders})
    figures: dict[str, dict[str, float]] = json.loads(path.read_text())
    return figures


@pytest.mark.parametrize("case", MARKS)
def test_llama3_8b_with_six_experts_trains_within_its_mark(
    measured: dict[str, dict[str, float]], case: str
) -> None:
    print(f"{case}: peak {measured[case]['peak'] / 1e9:.2f} GB, mark {MARKS[case] / 1e9:.0f}")
    assert measured[case]["peak"] <= MARKS[case]


@pytest.mark.parametrize("case", MARKS)
def test_the_plan_predicts_the_peak(measured: dict[str, dict[str, float]], case: str) -> None:
    assert measured[case]["plan"] == pytest.approx(measured[case]["peak"], rel=WITHIN)


def test_eight_bit_moments_are_the_same_on_the_gpu_and_in_paged_memory() -> None:
    """Bit for bit what the CPU makes of the same numbers."""
    piece = Piece("q.bank.lora_A", (3, 2, 300), 0, 0, 1800)
    values = torch.randn(1800, generator=torch.Generator().manual_seed(0))
    stacks = [stacked(spans_of(piece, everything_here(3)))]
    found = []
    for device, keep in (("cpu", Keep("8bit")), ("cuda", Keep("8bit")), ("cuda", Keep("8bit", paged=True))):
        shard = Shard(torch.nn.Parameter(torch.zeros(1800, device=device)), (piece,))
        moments = Moments([shard], stacks, keep, routers=3)
        for kind in KINDS:
            moments.fill(kind, 0, values.abs() if kind == "exp_avg_sq" else values)
        found.append([moments.flat(kind, 0) for kind in KINDS])
    for other in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], other, strict=True))


def test_paged_memory_is_the_devices_and_goes_beyond_what_is_free() -> None:
    """More than the GPU has free can be had, written and read."""
    free = torch.cuda.mem_get_info()[0]
    if free > 100e9:
        pytest.skip("would need as much host memory as the GPU has free")
    tensor = zeros((int(free * 1.1) // 4,), torch.float32, True, torch.device("cuda", 0))
    assert tensor.device.type == "cuda"
    tensor[-1] = 3.0
    assert float(tensor[-1]) == 3.0 and float(tensor[0]) == 0.0
