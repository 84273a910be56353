"""``dsmixer compare FILE``: variants of a recipe and other methods on several seeds, and an honest table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmixer.cli.arguments import count
from dsmixer.config.comparison import LoadedComparison, load_comparison
from dsmixer.config.errors import UserError
from dsmixer.config.explain import is_key

DONE, FAILED, STOPPED = 0, 1, 75


def add_parser(subparsers: Any) -> None:
    """Add the command ``compare``."""
    parser = subparsers.add_parser(
        "compare",
        help="run variants of a recipe and other methods on several seeds, and write the table",
        description="Run what a comparison's file lists, cell by cell: the experts of stage one once a seed, "
        "each variant on them, and other methods beside. Then write table, spread, plots and one page. The "
        "same command goes on where it was stopped, and runs nothing that is done.",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="the comparison: a recipe with a section more"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="values that stand over the file's, under those that its variants set",
    )
    parser.add_argument("--scale", metavar="NAME", help="a scale of the file, such as small")
    parser.add_argument("--seeds", metavar="0,1,2", help="run these instead of comparison.seeds")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="VARIANT", help="run these variants alone"
    )
    parser.add_argument(
        "--reuse",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="take over what these comparisons have finished, where a cell is exactly the same",
    )
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="cells that run at once (1)")
    parser.add_argument("--processes", type=count, default=1, metavar="N", help="ranks of a cell (1)")
    parser.add_argument("--table", action="store_true", help="run nothing; write tables of what is there")
    parser.add_argument(
        "--list", action="store_true", help="run nothing; list the cells and how far they are"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON; lines go to stderr")
    parser.set_defaults(run=run)
    _take_intermixed(parser)


def _take_intermixed(parser: Any) -> None:
    """Let overrides stand behind flags as well, which a subcommand's parser takes for a mistake."""
    plain = parser.parse_known_args

    def parse(args: Any = None, namespace: Any = None) -> Any:
        parser.parse_known_args = plain
        try:
            return parser.parse_known_intermixed_args(args, namespace)
        finally:
            parser.parse_known_args = parse

    parser.parse_known_args = parse


def run(args: argparse.Namespace) -> int:
    """List, run or gather; 0 done, 1 a cell failed, 75 stopped by a signal after the cells saved.

    Raises:
        UserError: a mistake in the file, found before anything runs.
    """
    from dsmixer.compare.plan import make_plan
    from dsmixer.compare.state import check_unchanged

    only, overrides = _apart(args.only, args.overrides)
    reused, overrides = _apart(args.reuse, overrides)
    seeds = [f"comparison.seeds=[{args.seeds}]"] if args.seeds is not None else []
    loaded = load_comparison(args.file, args.scale, [*overrides, *seeds])
    plan = make_plan(loaded, only)
    if args.list:
        return _list(plan, args.json)
    if args.table:
        check_unchanged(plan)
        return _written(plan, [], args.json, DONE)
    _tell_scales(loaded)
    return _run(plan, args, [Path(folder) for folder in reused])


def _run(plan: Any, args: argparse.Namespace, reused: Sequence[Path]) -> int:
    from dsmixer.checkpoint.atomic import write_text
    from dsmixer.compare.launching import Resources, check_resources
    from dsmixer.compare.methods import check_methods
    from dsmixer.compare.plan import check_plan, plan_text
    from dsmixer.compare.reuse import take_over
    from dsmixer.compare.running import Runner, alone_in
    from dsmixer.compare.state import check_unchanged
    from dsmixer.config.yaml_text import dump_yaml
    from dsmixer.training.telling import tell

    resources = Resources(args.jobs, args.processes)
    check_resources(resources)
    check_plan(plan)
    check_unchanged(plan)
    written, text = plan.folder / "comparison.yaml", dump_yaml(plan_text(plan))
    if not written.is_file() or written.read_text(encoding="utf-8") != text:
        check_methods(plan)  # which takes seconds: it imports them
    with alone_in(plan.folder):
        write_text(written, text)
        take_over(plan, reused, lambda text: tell(text, sys.stderr))
        runner = Runner(plan, resources, lambda text: tell(text, sys.stderr))
        outcomes = runner.run()
        code = _code(outcomes, runner.stopped)
        if code == STOPPED:
            tell("dsmixer: stopped; run the same command again to go on", sys.stderr)
            if args.json:
                _print_json(plan, outcomes, {}, code)
            return STOPPED
        return _written(plan, outcomes, args.json, code)


def _code(outcomes: Sequence[Any], signalled: bool) -> int:
    hows = {outcome.how for outcome in outcomes}
    if "stopped" in hows or (signalled and "not run" in hows):
        return STOPPED
    return DONE if hows <= {"done", "was done"} else FAILED


def _written(plan: Any, outcomes: Sequence[Any], as_json: bool, code: int) -> int:
    """Gather, write everything that is made of the cells, and say where it is."""
    from dsmixer.compare.results import RESULTS_FILE, write_results
    from dsmixer.report.comparison_page import write_comparison

    if not plan.folder.is_dir():
        fix = "run the comparison first, without --table"
        raise UserError("there is nothing to make a table of", where=str(plan.folder), fix=fix)
    results = write_results(plan)
    files = {"results": str(plan.folder / RESULTS_FILE), **write_comparison(plan.folder, results)}
    if as_json:
        _print_json(plan, outcomes, files, code)
        return code
    failed = {o.cell.name: str(plan.log(o.cell)) for o in outcomes if o.how == "failed"}
    _print(results, files, failed)
    return code


def _print_json(plan: Any, outcomes: Sequence[Any], files: dict[str, str], code: int) -> None:
    cells = [
        {"cell": o.cell.name, "how": o.how, "seconds": o.seconds, "log": str(plan.log(o.cell))}
        for o in outcomes
    ]
    print(json.dumps({"folder": str(plan.folder), "files": files, "cells": cells, "exit_code": code}))


def _print(results: Any, files: Any, failed: Any) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from dsmixer.report.comparison_tables import markdown

    Console().print(Markdown(markdown(results)))
    print(f"table: {files['table']}\npage:  {files['page']}")
    for name, log in failed.items():
        print(f"failed: {name}, see {log}")


def _list(plan: Any, as_json: bool) -> int:
    from rich.console import Console
    from rich.table import Table

    from dsmixer.compare.state import state_of

    cells = [
        {"cell": cell.name, "row": cell.label, "seed": cell.seed, "state": state_of(plan, cell)}
        for cell in plan.cells
    ]
    if as_json:
        print(json.dumps({"folder": str(plan.folder), "cells": cells}))
        return DONE
    table = Table(title=f"{len(cells)} cells in {plan.folder}", title_justify="left")
    for heading in ("cell", "variant or experts", "state"):
        table.add_column(heading)
    for cell in cells:
        table.add_row(str(cell["cell"]), str(cell["row"]), str(cell["state"]))
    Console().print(table)
    return DONE


def _tell_scales(loaded: LoadedComparison) -> None:
    """Say which scales there are where the full form was not meant; nothing is refused for it."""
    if loaded.scale is None and loaded.scales:
        from dsmixer.training.telling import tell_problem

        listed = ", ".join(f"--scale {name}" for name in loaded.scales)
        tell_problem(f"this is the full form; the file also has {listed}")


def _apart(words: Sequence[str], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """A flag's words and the overrides: one behind ``--only VARIANT ...`` is taken for what it looks like."""
    late = [text for text in words if _is_override(text)]
    return [text for text in words if text not in late], [*overrides, *late]


def _is_override(text: str) -> bool:
    key, equals, _ = text.partition("=")
    return bool(equals) and "." in key and (is_key(key) or key.startswith("comparison."))
