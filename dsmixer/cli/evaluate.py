"""``dsmixer evaluate``: score a mixture against its base, each expert alone and the uniform mixture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dsmixer.cli.loading import add_model_arguments, find_mixture, load
from dsmixer.config.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add the command to ``dsmixer``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a mixture on held-out examples",
        description="Scores the base, each expert alone, the uniform mixture and the trained mixture: "
        "held-out loss, multiple choice by log-likelihood, exact match of written answers, and where the "
        "routers send tokens.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        action="append",
        metavar="NAME=PATH",
        help="a domain and its test file or hub id; repeat for more (default: the test data of the run)",
    )
    parser.add_argument(
        "--max-examples", type=_count, help="most test examples a domain, drawn with the run's seed"
    )
    parser.add_argument(
        "--max-length", type=_count, help="longest row in tokens (default: as in the run, or 1024)"
    )
    parser.add_argument(
        "--batch-size", type=_count, help="rows a forward pass (default: as in the run, or 8)"
    )
    parser.add_argument(
        "--max-new-tokens", type=_count, help="longest written answer (default: as in the run, or 64)"
    )
    parser.add_argument(
        "--no-exact-match", action="store_true", help="do not write answers, score given ones only"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result to this JSON file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; 0 on success.

    Raises:
        UserError: the mixture or the data can't be used.
    """
    from rich.console import Console

    from dsmixer.evaluation.methods import evaluate_mixture
    from dsmixer.evaluation.table import print_evaluation, write_json

    # the data is read before the model, so that a mistake in it shows at once
    domains, settings, max_length, seed = _data(args)
    model, tokenizer = load(args)
    result = evaluate_mixture(
        model, tokenizer, domains, settings, max_length=max_length, seed=seed, progress=_progress()
    )
    if args.output is not None:
        write_json(args.output, result)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_evaluation(result, Console())
    return 0


def _data(args: argparse.Namespace) -> tuple[list[Any], Any, int, int]:
    """Domains with test examples, evaluation settings, longest row, seed."""
    from dsmixer.config.recipe import load_recipe
    from dsmixer.config.schema import DataConfig, EvaluationConfig
    from dsmixer.data.domains import load_domains

    mixture = find_mixture(args.folder)
    config = mixture.parent / "config.yaml"
    recipe = load_recipe(config).recipe if config.is_file() else None
    settings = recipe.evaluation if recipe is not None else EvaluationConfig()
    data = recipe.data if recipe is not None else None
    seed = recipe.run.seed if recipe is not None else 0
    if args.data:
        entries = tuple(_domain(text) for text in args.data)
        names = [entry.name for entry in entries]
        if len(set(names)) < len(names):
            raise UserError(f"a domain is named twice: {', '.join(names)}", where="--data", fix="rename one")
        data = (data or DataConfig()).model_copy(update={"domains": entries, "source": None})
    if data is None:
        raise UserError(
            "there is no config.yaml beside the mixture to say what to score it on",
            where=str(mixture),
            fix="name the data: --data NAME=PATH",
        )
    changes = {
        "max_examples": args.max_examples,
        "batch_size": args.batch_size,
        "generate_max_new_tokens": args.max_new_tokens,
        "exact_match": False if args.no_exact_match else None,
    }
    settings = settings.model_copy(update={key: value for key, value in changes.items() if value is not None})
    return load_domains(data, seed=seed, quarantine=None), settings, args.max_length or data.max_length, seed


def _domain(text: str) -> Any:
    from pydantic import ValidationError

    from dsmixer.config.schema import DomainConfig

    name, equals, path = text.partition("=")
    try:
        if not equals:
            raise UserError(f"{text!r} names no file", where="--data", fix="write NAME=PATH")
        # only test examples are scored; a domain has to have a train part, so the file serves as both
        return DomainConfig(name=name, train=path, test=path, split_train="test")
    except ValidationError as error:
        problem = f"{text!r}: {error.errors()[0]['msg']}"
        raise UserError(problem, where="--data", fix="write NAME=PATH") from error


def _progress() -> Any:
    """Method and passes on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return None

    def show(method: str, done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{method}: {done} of {total} passes\033[K", end=end, file=sys.stderr, flush=True)

    return show


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value
