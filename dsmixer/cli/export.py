"""``dsmixer export``: a mixture as one plain PEFT adapter, for servers that know nothing else."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsmixer.cli.arguments import count
from dsmixer.cli.loading import add_model_arguments, find_mixture, load
from dsmixer.config.errors import UserError

HELD_OUT = 0.2  # of the examples of a file; a domain has a test part
EXAMPLES = 500
OF_STATIC = {
    "max_examples": EXAMPLES,
    "min_weight": 0.0,
    "max_length": None,
    "batch_size": 8,
    "seed": 0,
    "base_model": None,
    "transfer": False,
    "dtype": None,
    "quantization": None,
    "device": None,
}
"""What only a static merge reads, with its defaults."""


def add_parser(subparsers: Any) -> None:
    """Add the command to ``dsmixer``."""
    parser = subparsers.add_parser(
        "export",
        help="write a mixture, or one of its experts, as a plain PEFT adapter",
        description="With --static, measures the mean weight that the routers give each expert on a task, "
        "bakes it into one plain LoRA adapter of the experts' ranks together, and tells what that costs on "
        "held-out examples. With --expert, copies one expert.",
    )
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--static", metavar="TASK", help="a file of examples, or the name of one of the run's domains"
    )
    what.add_argument("--expert", metavar="NAME", help="one expert, as it is")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made here")
    parser.add_argument(
        "--max-examples",
        type=count,
        default=EXAMPLES,
        help=f"most examples to weigh with, and most held-out ones (default: {EXAMPLES})",
    )
    parser.add_argument(
        "--min-weight",
        type=_weight,
        default=0.0,
        metavar="WEIGHT",
        help="leave out experts whose mean weight is below this (default: none)",
    )
    parser.add_argument(
        "--max-length", type=count, help="longest row in tokens (default: as in the run, or 1024)"
    )
    parser.add_argument("--batch-size", type=count, default=8, help="rows a forward pass (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of examples (default: 0)")
    parser.add_argument(
        "--license", type=_license, metavar="ID", help="license in the card, as the hub names it"
    )
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the adapter and say what it is worth; 0 on success.

    Raises:
        UserError: mixture, task or expert are not there, or something is in the folder already.
    """
    from dsmixer.adapters.publish import check_free

    check_free(args.out)
    mixture = find_mixture(args.folder)
    _check(args, mixture)
    facts = _export_expert(mixture, args) if args.expert is not None else _export_static(mixture, args)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts, args.out)
    return 0


def _check(args: argparse.Namespace, mixture: Path) -> None:
    if args.out.resolve().is_relative_to(mixture.resolve()):
        fix = "choose another folder: what lies in a mixture is gone when the mixture is written again"
        raise UserError(f"it is inside the mixture {mixture}", where=f"--out {args.out}", fix=fix)
    given = [name for name, default in OF_STATIC.items() if getattr(args, name) != default]
    if args.expert is not None and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        fix = f"leave {flags} out, or use --static"
        raise UserError("one expert is copied as it is, and no model is loaded", where="--expert", fix=fix)


def _export_expert(mixture: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One expert's two files, with a card."""
    from dsmixer.adapters.card import expert_card
    from dsmixer.adapters.mixture_folder import CARD_FILE
    from dsmixer.adapters.outside_peft import check_applied_by_peft
    from dsmixer.adapters.publish import published
    from dsmixer.adapters.saved_mixture import read_mixture

    saved = read_mixture(mixture)
    if args.expert not in saved.config.experts:
        fix = f"choose from {', '.join(saved.config.experts)}"
        raise UserError(f"no expert is called {args.expert!r}", where="--expert", fix=fix)
    adapter = saved.pool.adapters[args.expert]
    check_applied_by_peft(saved.about.get("model_type"), adapter.pairs, f"--expert {args.expert}")
    facts = {
        "expert": args.expert,
        "rank": adapter.rank,
        "num_projections": len(adapter.pairs),
        "base": saved.about.get("model"),
        "license": args.license,
    }
    with published(args.out, may_replace=lambda _: False) as part:
        _write_expert(mixture, args.expert, adapter, part)
        (part / CARD_FILE).write_text(expert_card(facts), encoding="utf-8")
    return facts


def _write_expert(mixture: Path, name: str, adapter: Any, part: Path) -> None:
    """The expert's own files, bit for bit; made where PEFT has saved all experts in one file."""
    from dsmixer.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, write_adapter

    inner = mixture / "experts" / name
    made = not inner.is_dir()
    if made:
        inner, about = part / "adapter", json.loads((mixture / CONFIG_FILE).read_text(encoding="utf-8"))
        pairs = {path: (pair.a_RD, pair.b_OR) for path, pair in adapter.pairs.items()}
        held = {path: pair for path, pair in pairs.items() if any(bool(matrix.any()) for matrix in pair)}
        write_adapter(
            inner,
            held or pairs,
            rank=adapter.config["r"],
            alpha=adapter.config["lora_alpha"],
            rslora=adapter.config["use_rslora"],
            targets=sorted(held or pairs),
            base=about.get("base_model_name_or_path"),
            revision=about.get("revision"),
            task_type=about.get("task_type") or "CAUSAL_LM",
        )
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(inner / file, part / file)
    if made:
        shutil.rmtree(inner)


def _export_static(mixture: Path, args: argparse.Namespace) -> dict[str, Any]:
    from dsmixer.adapters.mixture_folder import read_description
    from dsmixer.adapters.outside_peft import check_applied_by_peft
    from dsmixer.adapters.static import carrying, kept_experts, model_type, pruned, write_static
    from dsmixer.data.encode import pad_token_id
    from dsmixer.evaluation.sheet import make_sheet
    from dsmixer.evaluation.static_weights import mean_weights, measure_gap
    from dsmixer.model.inject import mixture_of
    from dsmixer.model.streams import decoder_start

    # the data is read before the model, so that a mistake in it shows at once
    weighed_on, held_out, max_length = _task(mixture, args)
    model, tokenizer = load(args)
    attached = mixture_of(model)
    check_applied_by_peft(model_type(attached), carrying(attached), "--static")
    sheet = make_sheet(
        (weighed_on, held_out),
        tokenizer,
        max_length=max_length,
        max_examples=args.max_examples,
        seed=args.seed,
        decoder_start=decoder_start(model.config),
    )
    batches = {"batch_size": args.batch_size, "pad_token_id": pad_token_id(tokenizer)}
    weights_ME = mean_weights(model, sheet, sheet.rows([0]), **batches)
    merges = {"static": weights_ME}
    if args.min_weight > 0:
        merges["static, pruned"] = pruned(weights_ME, args.min_weight)
    chosen = list(merges.values())[-1]
    kept = kept_experts(attached, chosen)
    if not kept:
        problem = f"every expert weighs less than {args.min_weight:g} on average"
        raise UserError(problem, where="--min-weight", fix="give a smaller weight")
    gap = measure_gap(model, sheet, sheet.rows([1]), merges, **batches)
    of_domain = [int((sheet.store.domain_ids[sheet.is_target_row] == index).sum()) for index in (0, 1)]
    facts: dict[str, Any] = {
        "task": weighed_on.name,
        "num_weighed": of_domain[0],
        "num_held_out": of_domain[1],
        "num_targets": gap.num_targets,
        "weights": dict(zip(attached.expert_names, weights_ME.mean(0).tolist(), strict=True)),
        "kept": kept,
        "losses": gap.losses,
        "differences": gap.differences,
        "license": args.license,
    }
    about = {**read_description(mixture)[0], **({"model": args.base_model} if args.base_model else {})}
    rank = write_static(attached, chosen, args.out, about=about, facts=facts)
    return {**facts, "rank": rank}


def _task(mixture: Path, args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Examples to weigh with and held-out ones, each as the test part of a domain, and the longest row."""
    from dsmixer.config.recipe import load_recipe
    from dsmixer.config.schema import DataConfig, DomainConfig
    from dsmixer.data.domains import load_domains

    config = mixture.parent / "config.yaml"
    data = load_recipe(config).recipe.data if config.is_file() else None
    max_length = args.max_length or (data or DataConfig()).max_length
    if Path(args.static).is_file():
        entry = DomainConfig(name="task", train=args.static)
        (domain,) = load_domains(DataConfig(domains=(entry,)), seed=args.seed, quarantine=None)
        domain = replace(domain, name=Path(args.static).name)
    else:
        domain = _domain_of_run(data, args, mixture)
    return (*_parts(domain, args), max_length)


def _domain_of_run(data: Any, args: argparse.Namespace, mixture: Path) -> Any:
    from dsmixer.data.domains import load_domains

    names = [] if data is None else [entry.name for entry in data.domains]
    if data is not None and (data.source is not None or args.static in names):
        entries = tuple(entry for entry in data.domains if entry.name == args.static)
        try:
            domains = load_domains(
                data.model_copy(update={"domains": entries}), seed=args.seed, quarantine=None
            )
        except UserError as error:
            where_from = "a recipe's relative paths begin where the run was started: start this there too"
            fix = f"{error.fix}; {where_from}" if error.fix else where_from
            raise UserError(error.problem, where=error.where, fix=fix) from error
        for domain in domains:
            if domain.name == args.static:
                return domain
    known = f" or one of the domains {', '.join(names)}" if names else ""
    where = "--static" if data is None else f"--static, {mixture.parent / 'config.yaml'}"
    raise UserError(
        f"{args.static!r} is no file and no domain", where=where, fix=f"give a file of examples{known}"
    )


def _parts(domain: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """A domain's own parts, or, where it has no test part, a share of its examples held out."""
    from dsmixer.data.seeds import generator

    weigh, held = list(domain.train), list(domain.test)
    if not held:
        if len(weigh) < 2:
            fix = "give two or more: some are weighed with, the others held out"
            raise UserError("there is one example", where=f"--static {args.static}", fix=fix)
        order = generator(args.seed, "static", domain.name).permutation(len(weigh)).tolist()
        num_held = max(1, round(HELD_OUT * len(weigh)))
        held, weigh = [weigh[i] for i in order[:num_held]], [weigh[i] for i in order[num_held:]]
    return replace(domain, train=[], test=weigh), replace(
        domain, name=f"{domain.name}, held out", train=[], test=held
    )


def _print(facts: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dsmixer.adapters.static import rank_note

    console = Console()
    if "losses" in facts:
        weights = ", ".join(f"{name} {weight:.3f}" for name, weight in facts["weights"].items())
        console.print(
            f"mean weights on {facts['num_weighed']} examples of {escape(facts['task'])}: {weights}"
        )
        table = Table(title=f"on {facts['num_held_out']} held-out examples, nats a target token")
        for heading in ("method", "loss", "above the mixture", "difference of logits"):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for name, loss in facts["losses"].items():
            difference = facts["differences"].get(name)
            cells = f"{loss:.4f}", f"{loss - facts['losses']['mixture']:+.4f}"
            table.add_row(name, *cells, "" if difference is None else f"{difference:.2%}")
        console.print(table)
    print(f"{out}: rank {facts['rank']}{rank_note(facts['rank'])}")


def _license(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no identifier of a license, such as apache-2.0")
    return text


def _weight(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{value} is no weight from 0 to below 1")
    return value
