"""``dsmixer train`` and ``launch/train.py``: the main job.

deepspeed --num_accelerators 2 launch/train.py --config RECIPE.yaml [section.key=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from dsmixer.config.checks import check_recipe
from dsmixer.config.ds_json import merge_ds_config
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import load_recipe
from dsmixer.training.telling import let_go, tell_problem

PROFILED = 20
"""Steps that are profiled where no number is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the main job, with those that DeepSpeed's launcher appends."""
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="the recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that stand over the recipe's"
    )
    parser.add_argument(
        "--stages",
        choices=("1", "2", "both"),
        default="both",
        help="run only this stage of the recipe now; a later call of the same command goes on",
    )
    parser.add_argument(
        "--from",
        dest="start_from",
        metavar="CHECKPOINT",
        help="go on from this checkpoint of the run, by step, as stage1/step-00000100 or by path; later ones "
        "are moved aside. Without it: from the newest",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on although the recipe changes the mathematics of the run in its folder",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=_steps,
        const=PROFILED,
        default=0,
        metavar="STEPS",
        help="say where the time of a step goes, in a table and in profile.json of the run folder, from this "
        f"many steps of each stage ({PROFILED}) after the first few; the run is the same",
    )
    parser.add_argument(
        "--profile-trace",
        action="store_true",
        help="profile, and write a trace of two more steps, for Perfetto or chrome://tracing",
    )
    parser.add_argument("--local_rank", type=int, default=None, help="set by DeepSpeed's launcher")
    parser.add_argument("--deepspeed", action="store_true", help="accepted for DeepSpeed's launcher")
    parser.add_argument(
        "--deepspeed_config", default=None, metavar="FILE", help="a DeepSpeed JSON file, as of ds_configs/"
    )


def _steps(text: str) -> int:
    """A number of steps, from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of steps; section.key=value stands before --profile, or write "
            f"--profile={PROFILED}"
        )
    return int(text)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("train", help="train a mixture from a recipe (one process)")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check everything that needs no model, then train.

    The heavy libraries are imported after the recipe is found good.
    """
    loaded = load_recipe(args.config, args.overrides)
    loaded, warnings = merge_ds_config(loaded, args.deepspeed_config)
    check_recipe(loaded, args.deepspeed_config)
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings:
            tell_problem(warning)
    from dsmixer.training.progress import quiet_libraries

    quiet_libraries()
    try:
        return _train(args, loaded)
    finally:
        let_go(sys.stdout)


def _train(args: argparse.Namespace, loaded: Any) -> int:
    from dsmixer.training.health import Stopped
    from dsmixer.training.leaving import FAILED, SAID, STOPPED
    from dsmixer.training.profile.steps import ProfileRequest
    from dsmixer.training.run import RunRequest, train

    stages = (1, 2) if args.stages == "both" else (int(args.stages),)
    try:
        steps = args.profile or (PROFILED if args.profile_trace else 0)
        profile = ProfileRequest(steps, args.profile_trace)
        train(RunRequest(loaded, stages, args.deepspeed_config, args.start_from, args.allow_changes, profile))
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            tell_problem(f"{stopped}; run the same command again to go on")
        return STOPPED
    except SAID:  # on rank 0
        return FAILED
    except UserError as error:
        raise loaded.located(error) from error
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """``launch/train.py``."""
    from dsmixer.cli.main import guarded

    parser = argparse.ArgumentParser(prog="launch/train.py", description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    return guarded(lambda: run(args))
