"""``dsmixer import``: ready-made adapters become a mixture folder, whose routers are still to be trained."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmixer.config.errors import UserError

if TYPE_CHECKING:
    from dsmixer.adapters.importing import Pool
    from dsmixer.model.inject import Mixture


def add_parser(subparsers: Any) -> None:
    """Add the command to ``dsmixer``."""
    parser = subparsers.add_parser(
        "import",
        help="make a mixture of adapters that you have",
        description="Makes a mixture folder of adapters that PEFT saved, each as a frozen expert, with fresh "
        "routers. The base's weights are not loaded: its configuration says what fits.",
    )
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="NAME=FOLDER_OR_HUB_ID",
        help="an expert's name and its adapter: a folder, or OWNER/NAME or OWNER/NAME@REVISION of the hub",
    )
    parser.add_argument("--base-model", required=True, metavar="PATH_OR_ID", help="the base of the adapters")
    parser.add_argument("--out", required=True, type=Path, metavar="MIXTURE", help="the folder to make")
    parser.add_argument("--replace", action="store_true", help="take the place of a mixture that is at --out")
    parser.add_argument("--revision", help="of the base model on the hub (default: its main one)")
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="q, k, v, o or names of linear modules that get mixers (default: what the adapters have)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="experts a token (default: 3, or all if fewer)"
    )
    parser.add_argument(
        "--router",
        choices=("per_projection", "per_block"),
        default="per_projection",
        help="a router for each projection, or one for those that read the same (default: per_projection)",
    )
    parser.add_argument(
        "--routing",
        choices=("topk", "soft", "hard_soft", "top_p"),
        default="topk",
        help="how the routers choose (default: topk)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the routers' start (default: 0)")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the folder and say what is in it; 0 on success.

    Raises:
        UserError: an adapter or the base can't be had, they do not fit, or something is at ``--out``.
    """
    from dsmixer.training.progress import quiet_libraries

    quiet_libraries()
    from dsmixer.adapters.importing import base_mismatches, parts_left_out, read_pool
    from dsmixer.adapters.mixture_folder import save_mixture
    from dsmixer.adapters.new_mixture import assemble_mixture, tokenizer_of
    from dsmixer.config.schema import BaseConfig

    _check_out(args.out, args.replace)
    base = BaseConfig(model=args.base_model, revision=args.revision)
    pool = read_pool(named_sources(args.adapters))
    mixture = assemble_mixture(
        base,
        pool,
        targets=args.targets,
        top_k=args.top_k,
        router=args.router,
        routing=args.routing,
        seed=args.seed,
    )
    tokenizer = tokenizer_of(base)
    save_mixture(mixture, args.out, tokenizer=tokenizer, base=args.base_model, revision=args.revision)
    config = mixture.model.config
    # a folder has no revision
    revision = None if Path(args.base_model).is_dir() else args.revision or "main"
    notes = base_mismatches(pool, args.base_model, revision, config) + parts_left_out(pool, config)
    about = _about(args, pool, mixture, notes)
    print(json.dumps(about, ensure_ascii=False) if args.json else "\n".join(_lines(about)))
    return 0


def _check_out(folder: Path, replace: bool) -> None:
    """Before anything is read; the routers of a mixture that is there may be trained.

    Raises:
        UserError: something is there, and is no mixture or is not to be replaced.
    """
    from dsmixer.adapters.mixture_folder import is_mixture_folder
    from dsmixer.adapters.publish import check_free

    is_mixture = is_mixture_folder(folder)
    if is_mixture and not replace:
        fix = "choose another folder, or give --replace to lose it"
        raise UserError("a mixture is there already", where=str(folder), fix=fix)
    check_free(folder, may_replace=lambda _: is_mixture)


def named_sources(pairs: Iterable[str]) -> dict[str, str]:
    """Adapters by the name of their expert, from ``NAME=FOLDER_OR_HUB_ID``.

    Raises:
        UserError: a name or a source is missing, or a name is there twice.
    """
    sources: dict[str, str] = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if not (name and equals and source):
            raise UserError(f"{pair!r} names no expert and its adapter", fix="write NAME=FOLDER_OR_HUB_ID")
        if name in sources:
            raise UserError(f"two experts are called {name!r}", fix="give each its own name")
        sources[name] = source
    return sources


def _about(args: argparse.Namespace, pool: Pool, mixture: Mixture, notes: list[str]) -> dict[str, Any]:
    """What was made, as values that a program may read."""
    experts = []
    for name, adapter in pool.adapters.items():
        pairs = [pair for pair in adapter.pairs.values() if pair.rank]
        experts.append(
            {
                "name": name,
                "source": str(adapter.folder),
                "ranks": sorted({pair.rank for pair in pairs}),
                "scales": sorted({pair.scaling for pair in pairs}),
                "projections": len(pairs),
            }
        )
    return {
        "folder": str(args.out),
        "base": args.base_model,
        "targets": list(mixture.config.targets),
        "projections": len(mixture.mixers),
        "routers": len(mixture.routers),
        "experts": experts,
        "notes": notes,
    }


def _lines(about: Mapping[str, Any]) -> list[str]:
    num = len(about["experts"])
    lines = [
        f"{about['folder']}: {num} expert{'s' if num > 1 else ''} on {about['projections']} projections, "
        f"{about['routers']} routers that are not trained yet"
    ]
    width = max(len(expert["name"]) for expert in about["experts"])
    for expert in about["experts"]:
        ranks = ", ".join(str(rank) for rank in expert["ranks"])
        scales = ", ".join(f"{scale:g}" for scale in expert["scales"])
        lines.append(
            f"  {expert['name']:<{width}}  rank {ranks}, scale {scales}, "
            f"{expert['projections']} of {about['projections']} projections"
        )
    lines += [f"note: {note}" for note in about["notes"]]
    folder, first = shlex.quote(about["folder"]), shlex.quote(about["experts"][0]["name"])
    return [
        *lines,
        f"next: try one expert:   dsmixer generate {folder} --expert {first} --prompt TEXT",
        f"      train the routers: a recipe with mixer.mixture: {about['folder']}, stage1.enabled: false and",
        "                         stage2.experts: frozen",
    ]
