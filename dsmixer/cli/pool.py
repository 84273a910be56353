"""``dsmixer pool``: change the experts of a published mixture, without its base model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dsmixer.config.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add the command, with a command of its own for each change."""
    parser = subparsers.add_parser(
        "pool",
        help="add, remove or rename experts of a mixture, or merge two",
        description="Changes the pool of a published mixture. The experts and the rows of the routers that "
        "stay are those of before, bit for bit; the result is another folder. Mixtures are given by their "
        "folder or that of their run.",
    )
    changes = parser.add_subparsers(dest="change", required=True, metavar="CHANGE")
    add = changes.add_parser("add", help="add adapters as experts")
    add.add_argument("mixture", type=Path, help="the mixture")
    add.add_argument("adapters", nargs="+", metavar="NAME=ADAPTER", help="an expert's name and its adapter")
    add.add_argument(
        "--extend", action="store_true", help="put mixers where only the new adapters have weights, too"
    )
    remove = changes.add_parser("remove", help="take experts out")
    remove.add_argument("mixture", type=Path, help="the mixture")
    remove.add_argument("names", nargs="+", metavar="NAME", help="an expert")
    rename = changes.add_parser("rename", help="give experts other names")
    rename.add_argument("mixture", type=Path, help="the mixture")
    rename.add_argument("names", nargs="+", metavar="OLD=NEW", help="an expert's name and its new one")
    merge = changes.add_parser("merge", help="put the pools of two mixtures together")
    merge.add_argument("mixture", type=Path, metavar="FIRST", help="a mixture, which decides how it routes")
    merge.add_argument("second", type=Path, metavar="SECOND", help="another one on the same base")
    merge.add_argument(
        "--prefix", default="", metavar="TEXT", help="put before the names of the second's experts"
    )
    show = changes.add_parser("show", help="say what is in a mixture")
    show.add_argument("mixture", type=Path, help="the mixture")
    for change, run in ((add, _add), (remove, _remove), (rename, _rename), (merge, _merge)):
        where = change.add_mutually_exclusive_group(required=True)
        where.add_argument("--out", type=Path, metavar="FOLDER", help="the new mixture's folder")
        where.add_argument("--in-place", action="store_true", help="replace the mixture by the new one")
        change.set_defaults(run=_changing, work=run)
    show.set_defaults(run=_show)
    for change in (add, remove, rename, merge, show):
        change.add_argument("--json", action="store_true", help="print the result as JSON")


def _changing(args: argparse.Namespace) -> int:
    """Change and say what there is now; 0 on success.

    Raises:
        UserError: the mixture or what is asked of it can't be.
    """
    from dsmixer.cli.loading import find_mixture
    from dsmixer.training.progress import quiet_libraries

    quiet_libraries()
    args.mixture = find_mixture(args.mixture)
    args.out = args.mixture if args.in_place else args.out
    changed = args.work(args)
    if args.json:
        values = {
            "folder": str(changed.folder),
            "experts": list(changed.experts),
            "notes": list(changed.notes),
        }
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return 0
    print(f"mixture: {changed.folder}\nexperts: {', '.join(changed.experts)}")
    for note in changed.notes:
        print(f"note: {note}")
    return 0


def _add(args: argparse.Namespace) -> Any:
    from dsmixer.adapters.pools import add_experts

    adapters = _pairs(args.adapters, "NAME=ADAPTER")
    return add_experts(args.mixture, adapters, args.out, extend=args.extend, in_place=args.in_place)


def _remove(args: argparse.Namespace) -> Any:
    from dsmixer.adapters.pools import remove_experts

    return remove_experts(args.mixture, args.names, args.out, in_place=args.in_place)


def _rename(args: argparse.Namespace) -> Any:
    from dsmixer.adapters.pools import rename_experts

    return rename_experts(args.mixture, _pairs(args.names, "OLD=NEW"), args.out, in_place=args.in_place)


def _merge(args: argparse.Namespace) -> Any:
    from dsmixer.adapters.pool_merge import merge_mixtures
    from dsmixer.cli.loading import find_mixture

    second = find_mixture(args.second)
    return merge_mixtures(args.mixture, second, args.out, prefix=args.prefix, in_place=args.in_place)


def _show(args: argparse.Namespace) -> int:
    """Say what is in a mixture; 0 on success.

    Raises:
        UserError: it is no mixture.
    """
    from dsmixer.adapters.pool_facts import pool_facts
    from dsmixer.cli.loading import find_mixture
    from dsmixer.training.progress import quiet_libraries

    quiet_libraries()
    facts = pool_facts(find_mixture(args.mixture))
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.table import Table

    base = facts["base"]
    print(f"mixture: {facts['folder']}\nbase:    {base['model']} ({base['model_type']})")
    print(f"mixers:  {', '.join(facts['targets'])}; {facts['num_routers']} routers, {facts['router']}")
    print(f"routing: {facts['routing']}, K={facts['top_k']}")
    for line in facts["history"]:
        print(f"changed: {line}")
    table = Table("expert", "rank", "alpha", "projections", "weights", "router rows")
    for expert in facts["experts"]:
        table.add_row(
            expert["name"],
            str(expert["rank"]),
            f"{expert['alpha']:g}",
            str(expert["num_projections"]),
            f"{expert['num_weights']:,}",
            f"{expert['row_distance']:.3f}",
        )
    console = Console()
    console.print(table)
    console.print("router rows: mean distance of an expert's rows from the mean of all")
    return 0


def _pairs(texts: list[str], form: str) -> dict[str, str]:
    """``NAME=VALUE`` arguments; a name twice is refused."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UserError(f"{text!r} is not {form}", fix=f"write {form}")
        if name in found:
            raise UserError(f"{name!r} is given twice", fix="give each name once")
        found[name] = value
    return found
