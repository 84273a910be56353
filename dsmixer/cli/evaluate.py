"""``dsmixer evaluate``: a mixture against its base and its experts, other methods, or lm-eval tasks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmixer.cli.arguments import add_data_arguments, count
from dsmixer.cli.loading import add_model_arguments, find_mixture, load
from dsmixer.config.errors import UserError

METHOD_FLAGS = ("method_settings", "train_examples", "seed")
DATA_FLAGS = ("data", "max_examples", "max_length", "max_new_tokens", "no_exact_match")
TASK_FLAGS = ("answered_as", "include_path", "limit", "num_fewshot", "run_generated_code")


def add_parser(subparsers: Any) -> None:
    """Add the command to ``dsmixer``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a mixture on held-out examples",
        description="Scores the base, each expert alone, the uniform mixture and the trained mixture: "
        "held-out loss, multiple choice by log-likelihood, exact match of written answers, and where the "
        "routers send tokens. With --methods other methods on the same experts instead, with --tasks tasks "
        "of lm-evaluation-harness.",
    )
    add_model_arguments(parser)
    _add_answer_arguments(parser)
    _add_method_arguments(parser)
    _add_task_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result to this JSON file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    parser.set_defaults(run=run)


def _add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", type=count, help="longest written answer (default: as in the run, or 64)"
    )
    parser.add_argument(
        "--no-exact-match", action="store_true", help="do not write answers, score given ones only"
    )


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    of_methods = parser.add_argument_group("other methods")
    of_methods.add_argument(
        "--methods",
        type=_names,
        metavar="NAME[,NAME...]",
        help="score these on the folder's experts, told what each costs: base, mixture, expert:NAME, "
        "expert:NAME@stage1 (the expert before stage two), or a method of docs/baselines.md",
    )
    of_methods.add_argument(
        "--method-settings",
        type=Path,
        metavar="FILE",
        help='settings of methods as JSON, such as {"mole": {"fitting.steps": 100}}',
    )
    of_methods.add_argument(
        "--train-examples",
        type=count,
        metavar="N",
        help="most training examples a domain that methods train on, drawn with the seed (default: all)",
    )
    of_methods.add_argument(
        "--seed", type=_seed, help="of what methods draw and where they start (default: the run's)"
    )


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    of_tasks = parser.add_argument_group("tasks of lm-evaluation-harness")
    of_tasks.add_argument(
        "--tasks", type=_names, metavar="NAME[,NAME...]", help="run these tasks instead of scoring domains"
    )
    of_tasks.add_argument(
        "--as",
        dest="answered_as",
        action="append",
        metavar="METHOD",
        help="who answers: mixture, base, uniform or expert:NAME; repeat for more (default: mixture, base)",
    )
    of_tasks.add_argument("--include-path", type=Path, metavar="DIR", help="folder of more task files")
    of_tasks.add_argument("--limit", type=count, metavar="N", help="most examples a task")
    of_tasks.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each prompt")
    of_tasks.add_argument(
        "--run-generated-code",
        action="store_true",
        help="let tasks such as HumanEval run the programs that the model writes, in a process with limits",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; 0 on success.

    Raises:
        UserError: the mixture or the data can't be used.
    """
    from rich.console import Console

    from dsmixer.evaluation.table import print_evaluation, write_json

    _check_together(args)
    show: Callable[[Any, Any], None] = print_evaluation
    if args.tasks:
        from dsmixer.cli.evaluate_tasks import evaluate_tasks

        result = evaluate_tasks(args)
    elif args.methods:
        from dsmixer.cli.evaluate_methods import print_methods, run_methods

        result, show = run_methods(args, read_data(args)), print_methods
    else:
        result = _evaluate(args)
    if args.output is not None:
        write_json(args.output, result)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console())
    return 0


def _check_together(args: argparse.Namespace) -> None:
    """Refuse flags that would be passed over in silence."""
    if args.tasks and args.methods:
        problem = "tasks are answered by the mixture and its experts, not by other methods"
        raise UserError(problem, where="--tasks", fix="call it once with --tasks and once with --methods")
    beside = {"methods": METHOD_FLAGS, "tasks": TASK_FLAGS}
    missing = [needed for needed in beside if not getattr(args, needed)]
    alone = [(flag, f"add --{needed}, or leave it out") for needed in missing for flag in beside[needed]]
    others = [(flag, "leave it out: tasks bring their own data") for flag in DATA_FLAGS if args.tasks]
    for flag, fix in (*alone, *others):
        value = getattr(args, flag)
        if value is not None and value is not False:
            name = "as" if flag == "answered_as" else flag.replace("_", "-")
            raise UserError("this says nothing here", where=f"--{name}", fix=fix)


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The mixture and what it is made of, as at the end of a run; experts before stage two are methods."""
    from dsmixer.evaluation.methods import KINDS, evaluate_mixture

    # the data is read before the model, so that a mistake in it shows at once
    read = read_data(args)
    kinds = [kind for kind in KINDS if kind in (read.settings.methods or KINDS)] or KINDS
    model, tokenizer = load(args)
    return evaluate_mixture(
        model,
        tokenizer,
        read.domains,
        read.settings,
        max_length=read.max_length,
        seed=read.seed,
        kinds=kinds,
        progress=_progress(),
    )


@dataclass(frozen=True)
class ReadData:
    """What an evaluation reads before the model.

    Attributes:
        domains: with test examples; of a run, as its recipe has them before anything is held out.
        settings: ``EvaluationConfig``, with what the command line changes.
        max_length: longest row, tokens.
        seed: the run's, or 0.
        mixture: the mixture's folder.
        recipe: the run's; None: there is no run around the mixture.
    """

    domains: list[Any]
    settings: Any
    max_length: int
    seed: int
    mixture: Path
    recipe: Any


def read_data(args: argparse.Namespace) -> ReadData:
    """Read the test data that the command line or the run names.

    Raises:
        UserError: there is no mixture, or no data for it, or it is bad.
    """
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
    domains = load_domains(data, seed=seed, quarantine=None)
    return ReadData(domains, settings, args.max_length or data.max_length, seed, mixture, recipe)


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


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to {2**32 - 1}")
    return value


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return list(dict.fromkeys(names))
