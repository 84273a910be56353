"""``dsmixer evaluate --methods``: other methods on a mixture's experts, each beside what it cost."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmixer.cli.loading import load
from dsmixer.config.errors import UserError

if TYPE_CHECKING:
    from dsmixer.baselines.interface import Given, Method
    from dsmixer.cli.evaluate import ReadData
    from dsmixer.evaluation.sheet import Sheet

WIDE = 8  # domains up to which a table has a column for each
ROUTERS, TRAIN_PART = "the run's router rows", "the train part"


def run_methods(args: argparse.Namespace, read: ReadData) -> dict[str, Any]:
    """Make the methods ready and score each; what can be found wrong without the model is told first.

    Returns:
        ``rows``: domain, method, metric, value, num_examples; ``costs``: by method, ``trainable`` weights,
        ``steps``, ``seconds``, ``peak_memory``, whether it is ``told`` the domain, and what it ``found``;
        ``own_experts``: the expert of each domain; ``training``: ``source`` and number of ``examples`` that
        methods trained on, ``all_examples``, which those have that train experts of their own, and the
        ``seed``.

    Raises:
        UserError: a method or a setting is not known, or a method can't work with what there is.
    """
    from dsmixer.adapters.mixture_folder import read_description
    from dsmixer.baselines.interface import Given
    from dsmixer.baselines.rows import training_rows
    from dsmixer.evaluation.sheet import make_sheet
    from dsmixer.model.inject import mixture_of
    from dsmixer.model.streams import decoder_start

    chosen = _chosen(args, read, list(read_description(read.mixture)[1].experts))
    part, whole, source = _training_part(args, read, chosen)
    model, tokenizer = load(args)
    sides: dict[str, Any] = {
        "max_length": read.max_length,
        "decoder_start": decoder_start(model.config),
    }
    seed = read.seed if args.seed is None else args.seed
    most = read.settings.max_examples
    sheet = make_sheet(read.domains, tokenizer, max_examples=most, seed=read.seed, **sides)
    rows, all_rows = (
        None
        if domains is None
        else training_rows(domains, tokenizer, max_examples=args.train_examples, seed=seed, **sides)
        for domains in (part, whole)
    )
    compared = _compare(read, Given(mixture_of(model), rows, seed, all_rows), tokenizer, sheet, chosen)
    counts = {
        key: 0 if given is None else len(given.store)
        for key, given in (("examples", rows), ("all_examples", all_rows or rows))
    }
    return compared | {"training": {"source": source, **counts, "seed": seed}}


def _compare(
    read: ReadData, given: Given, tokenizer: Any, sheet: Sheet, chosen: Mapping[str, Method]
) -> dict[str, Any]:
    from dsmixer.baselines.evaluate import evaluate_methods
    from dsmixer.evaluation.methods import BATCH_SIZE
    from dsmixer.evaluation.scoring import majority_rows

    settings = read.settings
    compared = evaluate_methods(
        given,
        tokenizer,
        sheet,
        chosen,
        batch_size=settings.batch_size or BATCH_SIZE,
        max_new_tokens=settings.generate_max_new_tokens if settings.exact_match else None,
        progress=_tell if sys.stderr.isatty() else None,
    )
    if "mixture" in compared.costs:
        compared.costs["mixture"] |= _cost_of_routing(read, given.mixture)
    return {
        "rows": [*majority_rows(sheet), *compared.rows],
        "costs": compared.costs,
        "own_experts": dict(zip(sheet.domains, sheet.own_experts, strict=True)),
    }


def _chosen(args: argparse.Namespace, read: ReadData, experts: list[str]) -> dict[str, Method]:
    from dsmixer.baselines.named import Names
    from dsmixer.baselines.registry import methods
    from dsmixer.baselines.settings import configured
    from dsmixer.baselines.stage_one import find_before_stage_two

    run = None if read.recipe is None else read.mixture.parent
    chosen = Names(experts, lambda: find_before_stage_two(run, read.recipe)).chosen(args.methods)
    if args.method_settings is None:
        return chosen
    with_settings = {name: method for name, method in chosen.items() if name in methods}
    where = f"--method-settings: {args.method_settings}"
    return chosen | configured(with_settings, _read_settings(args.method_settings), where)


def _read_settings(path: Path) -> dict[str, Any]:
    where, fix = f"--method-settings: {path}", 'give a JSON file, such as {"mole": {"fitting.steps": 100}}'
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't be read: {error}", where=where, fix=fix) from error
    if not isinstance(found, dict):
        raise UserError("this is no JSON object", where=where, fix=fix)
    return found


def _training_part(
    args: argparse.Namespace, read: ReadData, chosen: Mapping[str, Method]
) -> tuple[list[Any] | None, list[Any] | None, str | None]:
    """The domains with what methods train on, with all that there is, and what the first is.

    None where no method trains. What a run held out of stage one for its routers, the experts have not seen,
    and a mixture gets it too. A method that has experts of its own gets what those of the run had, besides;
    None where that is the same.
    """
    from dsmixer.data.domains import load_domains
    from dsmixer.data.holdout import hold_out_router_examples
    from dsmixer.training.data import keeps_router_examples

    training = [name for name, method in chosen.items() if method.trains]
    if not training:
        return None, None, None
    recipe = read.recipe
    if recipe is None:
        raise UserError(
            f"{training[0]} trains, and there is no config.yaml beside the mixture to say on what",
            where="--methods",
            fix="give the folder of the run, runs/NAME, or leave it out",
        )
    domains = read.domains
    if args.data:  # that is for scoring alone
        domains = load_domains(recipe.data, seed=recipe.run.seed, quarantine=None)
    data = recipe.stage2.data
    if data.source is not None or not keeps_router_examples(recipe):
        return domains, None, TRAIN_PART
    _, held_out, _ = hold_out_router_examples(domains, data, recipe.run.seed)
    by_name: dict[str, list[Any]] = {domain.name: [] for domain in domains}
    for example in held_out:
        by_name[example.domain].append(example)
    part = [dataclasses.replace(domain, train=by_name[domain.name]) for domain in domains]
    return part, domains, ROUTERS


def _cost_of_routing(read: ReadData, mixture: Any) -> dict[str, Any]:
    """What stage two of the run trained; steps and seconds are None where they were not written down."""
    from dsmixer.report.run_folder import METRICS_FILE, read_metrics

    routers = sum(parameter.numel() for _, parameter in mixture.router_parameters())
    if read.recipe is None:
        return {"trainable": routers, "steps": None, "seconds": None}
    if not read.recipe.stage2.enabled:
        return {"trainable": 0, "steps": 0, "seconds": 0.0}
    if read.recipe.stage2.experts == "preserve":
        routers += sum(mixer.bank.num_weights() for mixer in mixture.mixers.values())
    logged = [row for row in read_metrics(read.mixture.parent / METRICS_FILE) if row["stage"] == 2]
    steps = max((row["step"] for row in logged), default=None)
    seconds = sum(row["seconds"] for row in logged) if steps is not None and len(logged) == steps else None
    return {"trainable": routers, "steps": steps, "seconds": seconds}


def _tell(name: str) -> None:
    print(f"{name} ...", file=sys.stderr, flush=True)


def print_methods(result: Mapping[str, Any], console: Any) -> None:
    """Print a table a metric, methods down and domains across, then what each method cost."""
    for metric in dict.fromkeys(row["metric"] for row in result["rows"]):
        console.print(_metric_table(result, metric))
    console.print(_cost_table(result["costs"]))
    training = result["training"]
    if training["source"] is not None:
        drawn = f"{training['examples']:,} examples of {training['source']}"
        more = training["all_examples"]
        told = f"; those with experts of their own all {more:,}" if more > training["examples"] else ""
        console.print(f"methods that train had {drawn}{told}; seed {training['seed']}")


def _metric_table(result: Mapping[str, Any], metric: str) -> Any:
    from rich.table import Table

    from dsmixer.evaluation.table import METRIC_TITLES

    rows = [row for row in result["rows"] if row["metric"] == metric]
    cells = {(row["method"], row["domain"]): row["value"] for row in rows}
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    table = Table(title=METRIC_TITLES.get(metric, metric), title_justify="left")
    table.add_column("method")
    for heading in (*(domains if len(domains) <= WIDE else ()), "mean"):
        table.add_column(heading, justify="right")
    for method in dict.fromkeys(row["method"] for row in rows):
        values = [cells.get((method, domain)) for domain in domains]
        known = [value for value in values if value is not None]
        # a method that is told the domain may not answer all, and a mean of some is no mean of all
        values = [
            *(values if len(domains) <= WIDE else ()),
            sum(known) / len(known) if len(known) == len(domains) else None,
        ]
        table.add_row(method, *("" if value is None else f"{value:.4f}" for value in values))
    return table


def _cost_table(costs: Mapping[str, Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="what each method trained or searched on the given experts", title_justify="left")
    table.add_column("method")
    for heading in ("weights", "steps", "seconds", "told the domain"):
        table.add_column(heading, justify="right")
    for name, cost in costs.items():
        steps, seconds = cost["steps"], cost["seconds"]
        table.add_row(
            name,
            f"{cost['trainable']:,}",
            "" if steps is None else f"{steps:,}",
            "" if seconds is None else f"{seconds:.1f}",
            "yes" if cost["told"] else "no",
        )
    return table
