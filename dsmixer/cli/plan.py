"""``dsmixer plan``: where a recipe's experts would live on a cluster, and what a rank holds and sends."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmixer.cli.arguments import count
from dsmixer.config.checks import check_routing
from dsmixer.config.ds_json import merge_ds_config
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, expert_names, load_recipe

if TYPE_CHECKING:
    from dsmixer.placement.plan import Plan
    from dsmixer.placement.request import Cluster, ModelShape
    from dsmixer.training.planning import PoolFacts

POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}
SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?)i?B?(?:/s)?\s*$")


def add_parser(subparsers: Any) -> None:
    """Add the command to ``dsmixer``."""
    parser = subparsers.add_parser(
        "plan",
        help="where the experts would live on a cluster, and what each rank holds and sends",
        description="Plans a recipe for a cluster without touching one: reads the base's configuration, no "
        "weights and no data, and shows memory a rank, bytes sent a step and the reason for the placement.",
    )
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="the recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that stand over the recipe's"
    )
    parser.add_argument("--world-size", type=count, required=True, metavar="W", help="number of ranks")
    parser.add_argument(
        "--ranks-per-node", type=count, default=8, metavar="N", help="ranks a machine (default 8)"
    )
    parser.add_argument(
        "--device-memory",
        type=_memory,
        metavar="80GB",
        help="memory of a rank's device, as on its label, where a GB is 2**30 bytes",
    )
    parser.add_argument(
        "--link-speed",
        type=_speeds,
        default=(None, None),
        metavar="450GB/s,50GB/s",
        help="what a rank sends a second inside its node, and to other nodes; given, the choice goes by time",
    )
    parser.add_argument(
        "--model-config",
        type=Path,
        metavar="PATH",
        help="a config.json or its folder, in place of base.model where the hub is out of reach",
    )
    parser.add_argument(
        "--experts", type=count, metavar="E", help="plan a pool of E experts instead of the recipe's"
    )
    parser.add_argument(
        "--tokens",
        action="append",
        default=[],
        metavar="NAME=N",
        help="training tokens of an expert, such as law=3e9; repeat for more (default: all alike)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print; 0 also where nothing fits.

    Raises:
        UserError: the recipe, the model's configuration or an argument can't be used.
    """
    loaded, _ = merge_ds_config(load_recipe(args.config, args.overrides))
    facts = _facts(args, loaded)
    if loaded.recipe.stage2.enabled:
        check_routing(loaded, list(facts.names))
    shape = _shape(args, loaded)
    try:
        plan = _plan(args, loaded, facts, shape)
    except UserError as error:
        raise loaded.located(error) from error
    if args.json:
        print(json.dumps(plan.to_dict(), indent=2))
        return 0
    from rich.console import Console

    from dsmixer.cli.plan_tables import print_plan

    print_plan(plan, Console())
    return 0


def _plan(args: argparse.Namespace, loaded: LoadedRecipe, facts: PoolFacts, shape: ModelShape) -> Plan:
    from dsmixer.placement.plan import make_plan
    from dsmixer.training.planning import plan_request

    return make_plan(plan_request(loaded, shape, facts, _cluster(args, loaded)))


def _cluster(args: argparse.Namespace, loaded: LoadedRecipe) -> Cluster:
    from dsmixer.placement.request import Cluster

    inside, between = args.link_speed
    written = loaded.recipe.placement.device_memory_gb
    memory = (
        int(written * 2**30) if args.device_memory is None and written is not None else args.device_memory
    )
    return Cluster(args.world_size, args.ranks_per_node, memory, inside, between)


def _shape(args: argparse.Namespace, loaded: LoadedRecipe) -> ModelShape:
    from dsmixer.model.load import bare_base
    from dsmixer.model.shape import model_shape
    from dsmixer.training.preflight import check_loss
    from dsmixer.training.progress import quiet_libraries

    quiet_libraries()
    recipe = loaded.recipe
    base = recipe.base
    if args.model_config is not None:
        base = base.model_copy(update={"model": _config_folder(args.model_config), "revision": None})
    bare = bare_base(base, packing=recipe.data.packing)
    check_loss(loaded, bare)
    return model_shape(bare, recipe.mixer.targets)


def _config_folder(path: Path) -> str:
    """The folder with the config.json that the user names, as a path that is not taken for a hub id."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            "no such file", where=f"--model-config {path}", fix="give a config.json or its folder"
        )
    return str(file.resolve() if file.name != "config.json" else file.resolve().parent)


def _facts(args: argparse.Namespace, loaded: LoadedRecipe) -> PoolFacts:
    from dsmixer.training.planning import PoolFacts

    names = expert_names(loaded.recipe)
    if args.experts is not None:
        names = [f"expert{i}" for i in range(args.experts)]
    if names is None:
        raise UserError(
            "a column of the data names the domains, and a plan reads no data",
            where=loaded.where("data.source.column"),
            fix="say how many experts there will be: --experts E",
        )
    return PoolFacts(names, _tokens(args, names))


def _tokens(args: argparse.Namespace, names: list[str]) -> dict[str, float]:
    tokens = {}
    for text in args.tokens:
        name, _, number = text.rpartition("=")
        if name not in names:
            fix = f"write one of {', '.join(names[:20])}"
            raise UserError(f"no expert is called {name!r}", where=f"--tokens {text}", fix=fix)
        try:
            tokens[name] = float(number)
        except ValueError:
            raise UserError(
                f"{number!r} is no number", where=f"--tokens {text}", fix="write NAME=3e9"
            ) from None
    if tokens and len(tokens) < len(names):
        missing = ", ".join([name for name in names if name not in tokens][:20])
        raise UserError(f"no tokens are given for {missing}", where="--tokens", fix="give all experts theirs")
    return tokens


def _memory(text: str) -> int:
    """Bytes from text such as 80GB. The makers of devices count in powers of 1024."""
    return int(_number(text, 1024))


def _speeds(text: str) -> tuple[float, float | None]:
    """Bytes a second inside a node and, after a comma, between nodes; in powers of 1000, as links are."""
    first, _, second = text.partition(",")
    return _number(first, 1000), _number(second, 1000) if second else None


def _number(text: str, step: int) -> float:
    match = SIZE.match(text)
    if match is None or float(match.group(1)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write one such as 80GB or 50GB/s")
    return float(match.group(1)) * float(step ** POWERS[match.group(2)])
