"""A line for each case, from rows made by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from support.launching import REPOSITORY

from tests.bench.case import Case
from tests.bench.results import Row, write
from tests.bench.summary import latest, summary
from tests.bench.timing import Spread

CASE = Case("train", width=2048, layers=2, experts=196, rank=16, sequence=512, dtype="bfloat16")
DECODE = replace(CASE, what="decode")


def _row(system: str, ratio: float, case: Case = CASE) -> Row:
    by = Spread(ratio, 0.9 * ratio, 1.1 * ratio, 5)
    return Row(
        case,
        system,
        seconds=by,
        to_lora=by,
        to_base=by,
        to_ours=by,
        peak=int(ratio * 1e9),
        tokens_per_second=123.4,
    )


ROWS = [
    *(_row("lora", 2.0), _row("lora_without_autocast", 1.5), _row("stage_two", 1.1), _row("loop", 1.2)),
    *(Row(CASE, "x_lora", problem="wants about 30 GB, 18 are free"), Row(CASE, "arrow", problem="it broke")),
    *(_row("base", 0.25, DECODE), _row("lora", 1.01, DECODE), _row("stage_two", 1.16, DECODE)),
]


def test_a_case_is_a_line_of_times_of_memory_and_of_decoding() -> None:
    times, peaks, answers, targets = summary(ROWS).split(":\n\n")[1:]
    head, _, line, *_ = times.splitlines()
    assert "stage one" not in head  # nothing was measured of it
    assert line == "| 2048 | bf16 | 196 | 16 | 512 | 1,500 | no memory | it broke | 1.20 | 1.10 | 123 |"
    assert peaks.splitlines()[2].startswith("| 2048 | bf16 | 196 | 16 | 512 | 2,000 | 1,500 |")
    assert answers.splitlines()[2] == "| 2048 | bf16 | 196 | 16 | 250.0 | 1.01 | 1.16 |"
    assert "| stage two / PEFT LoRA | 2048, bf16, E=196, r=16, 512 tokens | at most 1.15 | 1.100 (" in targets
    assert "2048, bf16, E=196, r=16 | at most 1.15 | 1.160 (1.044 to 1.276) | missed |" in targets
    assert "| any other mixture / ours | 1 of them | at least 1.00 | least 1.20 | met by 1 |" in targets


def test_a_peer_that_is_not_behind_has_its_own_line() -> None:
    found = summary([_row("stage_two", 1.1), _row("loop", 1.05)])
    assert "| plain loop / ours | 2048, bf16, E=196, r=16, 512 tokens | at least 1.00 | 1.050 (0.945" in found
    assert "| least 1.05 | met by 0 |" in found


def test_a_case_measured_again_stands_where_it_stood() -> None:
    other = replace(CASE, sequence=1024)
    first, again = [_row("lora", 2.0), _row("lora", 3.0, other)], [_row("lora", 1.0), _row("loop", 1.0)]
    assert latest([first, again]) == [*again, first[1]]


def test_the_command_reads_files_and_draws(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {}, ROWS, [])
    command = [sys.executable, "-m", "tests.bench.summary", "a.json", "--plot", "ratios.svg"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == summary(ROWS).strip()
    assert "<svg" in (tmp_path / "ratios.svg").read_text(encoding="utf-8")
