"""``dsmixer doctor``: what this machine has and what it lacks, with a fix for each."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmixer.cli.arguments import count
from dsmixer.config.errors import UserError
from dsmixer.training.machine.finding import Finding, Status, problem, worst

if TYPE_CHECKING:
    from dsmixer.training.machine.probing import Answers

MARKS: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}
LOG_WIDTH = 140
"""Columns where no terminal says how many there are."""

CPU_RANKS = 2
"""Ranks of a run on the CPU, where the recipe and the command line say nothing, as in the documentation."""


def add_parser(subparsers: Any) -> None:
    """Add the command to ``dsmixer``."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine, and whether a recipe fits it",
        description="Looks at packages, compiler, GPUs, memory, disks and network of this machine, and says "
        "what to do about what is wrong. It changes nothing. Exit code 0: all is well, warnings "
        "allowed; 1: a problem; 2: wrong arguments.",
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="a recipe to hold against this machine")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that stand over the recipe's"
    )
    parser.add_argument(
        "--ranks", type=count, metavar="N", help="ranks on this machine (default: its GPUs, or 2 on the CPU)"
    )
    parser.add_argument(
        "--model-config",
        type=Path,
        metavar="PATH",
        help="a folder with a config.json, in place of base.model where the hub is out of reach",
    )
    parser.add_argument(
        "--timeout",
        type=count,
        default=60,
        metavar="SECONDS",
        help="longest wait for one check; raise it where packages lie on a slow file system (default 60)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 on warnings too")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, and print what was found; 1 where there is a problem, or with ``--strict`` a warning.

    Raises:
        UserError: there is no such recipe or model configuration, or overrides stand without a recipe.
    """
    _check_arguments(args)
    findings = list(look(args))
    status = worst(findings)
    if args.json:
        print(json.dumps({"status": status, "findings": [f.to_dict() for f in findings]}, indent=2))
    else:
        _print(findings)
    return int(status == "problem" or (args.strict and status == "warning"))


def look(args: argparse.Namespace) -> Iterator[Finding]:
    """Every finding, in order. What takes long runs beside each other."""
    from dsmixer.training.machine.collective import check_ranks_meet, start_ranks
    from dsmixer.training.machine.compiler import check_building
    from dsmixer.training.machine.devices import check_devices
    from dsmixer.training.machine.network import check_network
    from dsmixer.training.machine.probing import collect, start_probe

    seconds = float(args.timeout)
    with ExitStack() as stack:
        answers = collect(stack.enter_context(start_probe(seconds)), seconds)
        ranks = [stack.enter_context(child) for child in start_ranks(seconds)]
        yield from _software(answers)
        yield from check_building(answers, seconds)
        yield from check_devices(answers, seconds)
        met = check_ranks_meet(ranks, answers)
    yield from check_network()
    yield from met
    yield from _host_and_recipe(args, answers)


def _software(answers: Answers) -> Iterator[Finding]:
    try:
        from dsmixer.training.machine.software import check_software
    except ModuleNotFoundError as error:
        fix = "install the package as docs/install.md says"
        yield problem("packages", f"they can't be compared: {error}", fix)
        return
    yield from check_software(answers)


def _host_and_recipe(args: argparse.Namespace, answers: Answers) -> Iterator[Finding]:
    """Memory and disks, held against what the recipe takes if there is one."""
    from dsmixer.training.machine.host import check_host, free_memory, hub_cache
    from dsmixer.training.machine.hub import check_hub, hub_names, is_cached
    from dsmixer.training.machine.recipe import Needs, check_loads, check_plan

    gpus = answers["devices"].facts.get("gpus", [])
    on_cpu = not gpus or answers["deepspeed"].facts.get("accelerator") == "cpu"
    ranks = args.ranks or (CPU_RANKS if on_cpu else len(gpus))
    memory = free_memory()[0] // ranks if on_cpu else min(gpu["total"] for gpu in gpus)
    needs, download, run_dir, told = Needs(), 0, Path("runs"), []
    if args.config is not None:
        loaded, finding = check_loads(args.config, args.overrides)
        told.append(finding)
        if loaded is not None:
            recipe, model = loaded.recipe, str(args.model_config or "")
            run_dir, names = Path(recipe.run.dir), hub_names(recipe)
            told += check_hub(names, hub_cache(), float(args.timeout))
            needs, finding = check_plan(
                loaded,
                args.overrides,
                answers=answers,
                ranks=ranks,
                memory=memory,
                model=model,
                seconds=float(args.timeout),
            )
            told.append(finding)
            fetched = [name for name in names if name[0] == "model" and not is_cached(name, hub_cache())]
            download = needs.base_bytes if fetched else 0
    yield from check_host(run_dir, ranks, on_cpu=on_cpu, needed=needs.run_bytes, download=download)
    yield from told


def _check_arguments(args: argparse.Namespace) -> None:
    if args.overrides and args.config is None:
        fix = "name the recipe with --config"
        raise UserError("a value of a recipe, and no recipe", where=args.overrides[0], fix=fix)
    for flag, path in (("--config", args.config), ("--model-config", args.model_config)):
        if path is not None and not os.path.exists(path):
            raise UserError("no such file", where=f"{flag} {path}", fix="correct the path")


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        text = finding.found if finding.fix is None else f"{finding.found}\n  Fix: {finding.fix}"
        table.add_row(Text(finding.status, MARKS[finding.status]), finding.check, Text(text))
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_WIDTH
    console = Console(highlight=False, width=width)
    console.print(table)
    counts = {status: sum(f.status == status for f in findings) for status in MARKS}
    console.print(", ".join(f"{status}: {counts[status]}" for status in reversed(MARKS)))
