"""Training steps and decoding, beside the frozen base, PEFT's LoRA and other mixtures of LoRA experts.

    python -m tests.bench                            # what each target is about, on the CPU
    python -m tests.bench --quick                    # fewer cases, shorter rows
    python -m tests.bench --short                    # one small case, to see that it runs
    python -m tests.bench --device cuda --widths 4096 --layers 32 --vocabulary 128256 \\
        --experts 6 --ranks 64 --sequence 1024 --dtypes bfloat16 nf4      # the shape of an 8B model
    python -m tests.bench --full                     # every combination: hours
    python -m tests.bench --moe-peft-python PATH     # with MoE-PEFT's MoLA, run by that interpreter

Every system is a process of its own that lives through the whole bench. On a case all build the same
random frozen Llama, and those that have experts the same weights of experts and routers; then they take
turns, three training steps or a few tokens each, in rounds; the median of a turn counts. A time is the
median over rounds, a ratio the median of the ratios within rounds, with quartiles. ``docs/performance.md``
says what is in a step of each.

``--out`` is left with ``results.json``, ``results.md``, ``ratios.svg`` and the logs of the processes;
``python -m tests.bench.summary`` makes a line of each case.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

from tests.bench.case import BYTES
from tests.bench.grid import cases
from tests.bench.results import Row, markdown, plot, show, show_verdicts, write
from tests.bench.running import Bench, Effort
from tests.bench.systems.registry import DEFAULT, SYSTEMS
from tests.bench.targets import check


def main() -> None:
    """Measure, print, keep."""
    args = parse()
    out: Path = args.out
    (out / "logs").mkdir(parents=True, exist_ok=True)
    effort = Effort(args.rounds, args.steps, args.tokens, args.patience, args.build_limit, args.memory)
    bench = Bench(args.systems, interpreters(args), out / "logs", effort)
    rows: list[Row] = []
    began = time.monotonic()
    try:
        for case in cases(args):
            print(f"{case.title()} ({time.monotonic() - began:.0f} s)", flush=True)
            measured = bench.measure(case)
            show(measured)
            rows += measured
            keep(out, args, bench, rows)
    finally:
        bench.close()
    show_verdicts(check(rows))
    print(f"{time.monotonic() - began:.0f} s; {out}/results.json, results.md, ratios.svg")


def keep(out: Path, args: argparse.Namespace, bench: Bench, rows: list[Row]) -> None:
    """Write everything that is there so far: what is measured is not lost with what comes after."""
    verdicts = check(rows)
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "processes": bench.facts,
    }
    write(args.json or out / "results.json", facts, rows, verdicts)
    (out / "results.md").write_text(markdown(rows, verdicts), encoding="utf-8")
    plot(rows, out / "ratios.svg")


def interpreters(args: argparse.Namespace) -> dict[str, str]:
    return {"mola": args.moe_peft_python} if args.moe_peft_python else {}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--what", nargs="+", default=["train", "decode"], choices=("train", "decode"))
    add("--systems", nargs="+", choices=list(SYSTEMS), help="default: all but frozen_experts")
    add("--widths", type=int, nargs="+", help="of the hidden states")
    add("--layers", type=int, default=2)
    add("--experts", type=int, nargs="+", help="E")
    add("--ranks", type=int, nargs="+", help="R")
    add("--sequence", type=int, nargs="+", help="tokens of a training row")
    add("--dtypes", nargs="+", choices=list(BYTES), help="of the base")
    add("--rows", type=int, default=1, help="rows of a step, and of a batch in decoding")
    add("--vocabulary", type=int, default=2048)
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=1, help="training steps a turn")
    add("--tokens", type=int, default=8, help="decoded tokens a turn")
    add("--patience", type=float, default=60.0, help="seconds; a longer first step is measured once")
    add("--build-limit", type=float, default=600.0, help="seconds to build a system and step once")
    add("--memory", type=float, default=0.8, help="share of the free memory that may be filled")
    add("--moe-peft-python", metavar="PATH", help="interpreter of the environment that holds moe-peft")
    add("--short", action="store_true", help="one small case, few rounds")
    add("--quick", action="store_true", help="fewer cases, shorter rows")
    add("--full", action="store_true", help="every combination of what is not given")
    add("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    add("--json", type=Path, metavar="FILE", help="in place of results.json in the folder")
    args = parser.parse_args(arguments)
    if args.short:
        args.rounds, args.tokens = min(args.rounds, 3), min(args.tokens, 3)
    if args.quick:
        args.rounds = min(args.rounds, 5)
    if args.systems is None:
        args.systems = [name for name in DEFAULT if name != "mola" or args.moe_peft_python]
    if "mola" in args.systems and not args.moe_peft_python:
        parser.error("mola needs --moe-peft-python: docs/performance.md says how its environment is made")
    return args


if __name__ == "__main__":
    main()
