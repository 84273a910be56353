"""``dsmixer report RUN``: one HTML page about a run, from its folder alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``report``."""
    parser = subparsers.add_parser(
        "report",
        help="write one self-contained HTML page about a run",
        description="Write RUN/report/index.html: curves, evaluation and routing of a run, in one page that "
        "needs no other file. It is made from the run folder alone, so a copied run will do.",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder, such as runs/NAME")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="write a picture of the result as well")
    parser.add_argument("--json", action="store_true", help="print the paths of what was written as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page, and the picture where one is asked for; print where they are."""
    from dsmixer.report.page import (
        build_report,
    )  # matplotlib is slow to import, and other commands do without
    from dsmixer.report.picture import result_picture

    written = {"report": str(build_report(args.run_folder))}
    if args.picture is not None:
        written["picture"] = str(result_picture(args.run_folder, args.picture))
    print(json.dumps(written) if args.json else "\n".join(written.values()))
    return 0
