"""``dsmixer prune``: a mixture with mixers only on the layers, or projections, where they help most."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmixer.cli.arguments import add_data_arguments, count
from dsmixer.cli.loading import add_model_arguments, find_mixture, load
from dsmixer.cli.passes import Passes
from dsmixer.config.errors import UserError

if TYPE_CHECKING:
    from dsmixer.adapters.pruning import Pruned
    from dsmixer.evaluation.layer_scores import Probe
    from dsmixer.model.inject import Mixture

BY = ("layer", "mixer")
DATA_FLAGS = ("data", "max_examples", "max_length", "batch_size")
SCORES = ("path", "ablation", "first_order", "size")


def add_parser(subparsers: Any) -> None:
    """Add the command to ``dsmixer``."""
    parser = subparsers.add_parser(
        "prune",
        help="keep a mixture's mixers only where they help",
        description="Scores each layer's mixers on held-out examples and writes a mixture that has them on "
        "the layers of the highest scores alone. The other projections are the base's own again: no router, "
        "no experts. Nothing is trained.",
    )
    add_model_arguments(parser)
    number = parser.add_mutually_exclusive_group(required=True)
    number.add_argument("--keep", type=count, metavar="N", help="how many layers (or mixers) keep theirs")
    number.add_argument("--share", type=_share, metavar="X", help="the same as a share, such as 0.5")
    number.add_argument(
        "--max-loss-rise",
        type=_rise,
        metavar="NATS",
        help="as few as keep the held-out loss within this of the whole mixture's, nats a target token",
    )
    parser.add_argument("--by", choices=BY, default="layer", help="what is pruned whole (default: layer)")
    parser.add_argument(
        "--score", choices=SCORES, help=f"what says where they help (default: {SCORES[0]}; docs/pruning.md)"
    )
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FILE.json",
        help="take the scores from this file if it is there, and use the data for the loss alone; else write "
        "them to it",
    )
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the new mixture's folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.set_defaults(run=run, max_new_tokens=None, no_exact_match=True)


def run(args: argparse.Namespace) -> int:
    """Score, choose, write, print; 0 on success.

    Raises:
        UserError: the mixture, the data or the scores can't be used, or nothing would be pruned, or nothing
            left.
    """
    from dsmixer.adapters.publish import check_free
    from dsmixer.cli.evaluate import read_data
    from dsmixer.evaluation.layer_scores import units_of
    from dsmixer.model.inject import mixture_of

    check_free(args.out)
    source = find_mixture(args.folder)
    known = args.scores is not None and args.scores.exists()
    wanted = args.max_loss_rise is not None or any(getattr(args, name) is not None for name in DATA_FLAGS)
    read = None if known and not wanted else read_data(args)
    model, tokenizer = load(args)
    mixture = mixture_of(model)
    units = units_of(mixture, args.by)
    passes = Passes()
    probe = None if read is None else _probe(model, tokenizer, read, passes)
    if known:
        scores = _read_scores(args, mixture, list(units))
        print(f"the scores are those in {args.scores}: none is made", file=sys.stderr, flush=True)
    else:
        scores = _score(args, probe, mixture, units, passes)
    names = _chosen(args, scores["units"], units, probe, passes)
    losses = None if probe is None else _losses(probe, units, names, scores, passes)
    written = _write(args, mixture, source, tokenizer, units, names, scores, losses)
    _print(args, mixture, units, names, scores, losses, written)
    return 0


def _probe(model: Any, tokenizer: Any, read: Any, passes: Passes) -> Probe:
    from dsmixer.data.encode import pad_token_id
    from dsmixer.evaluation.layer_scores import Probe
    from dsmixer.evaluation.methods import BATCH_SIZE
    from dsmixer.evaluation.sheet import make_sheet
    from dsmixer.model.streams import decoder_start

    sheet = make_sheet(
        read.domains,
        tokenizer,
        max_length=read.max_length,
        max_examples=read.settings.max_examples,
        seed=read.seed,
        decoder_start=decoder_start(getattr(model, "config", None)),
    )
    rows = read.settings.batch_size or BATCH_SIZE
    return Probe(model, sheet, rows, pad_token_id(tokenizer), passes.tick)


def _score(
    args: argparse.Namespace,
    probe: Probe | None,
    mixture: Mixture,
    units: Mapping[str, Sequence[str]],
    passes: Passes,
) -> dict[str, Any]:
    from dsmixer.checkpoint.atomic import write_json
    from dsmixer.evaluation.layer_scores import methods, num_passes

    assert probe is not None
    method = args.score or SCORES[0]
    what = f"scoring {len(units)} {args.by}s by {method} on {len(probe.sheet.examples)} examples"
    with passes.of(what, num_passes(method, len(units)) * probe.num_batches):
        values = methods[method](probe, units)
    _check_finite(values, str(args.folder), "see whether its loss is finite there (dsmixer evaluate)")
    found = {
        "score": method,
        "by": args.by,
        "weights": _digest(mixture),
        "num_examples": len(probe.sheet.examples),
        "rows": _digest_of_rows(probe),
        "units": values,
    }
    if args.scores is not None:
        write_json(args.scores, found)
    return found


def _digest(mixture: Mixture) -> str:
    """Of all weights of routers and experts: by these the scores of one mixture are told from another's."""
    digest = hashlib.sha256()
    for name, weight in (*mixture.router_parameters(), *mixture.expert_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest_of_rows(probe: Probe) -> str:
    """Of all tokens and which of them are targets: by these the rows of the scores are told from others."""
    store, digest = probe.sheet.store, hashlib.sha256()
    for row in probe.rows:
        digest.update(f"{store.domain_ids[row]} {store.target_starts[row]}".encode())
        digest.update(store.input_ids(row).tobytes())
    return digest.hexdigest()


def _read_scores(args: argparse.Namespace, mixture: Mixture, names: Sequence[str]) -> dict[str, Any]:
    """What an earlier call has written to ``--scores``.

    Raises:
        UserError: it is something else, or of another mixture, unit or score.
    """
    where, fix = str(args.scores), "give another file, and the scores are made anew"
    try:
        found = json.loads(args.scores.read_text(encoding="utf-8"))
        told = {key: found[key] for key in ("score", "by", "weights", "num_examples")}
        told["rows"] = found.get("rows")
        told["units"] = {name: _number(found["units"][name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"holds no scores of this mixture by {args.by} ({type(error).__name__}: {error})"
        raise UserError(problem, where=where, fix=fix) from error
    for key, wanted in (("score", args.score), ("by", args.by), ("weights", _digest(mixture))):
        if wanted is not None and told[key] != wanted:
            of_what = "of another mixture" if key == "weights" else f"of {key} {told[key]}, not {wanted}"
            raise UserError(f"holds scores {of_what}", where=where, fix=fix)
    _check_finite(told["units"], where, fix)
    return told


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.60} is no number")
    try:
        return float(value)
    except OverflowError:  # a whole number past what a float holds
        return math.inf if value > 0 else -math.inf


def _check_finite(scores: Mapping[str, float], where: str, fix: str) -> None:
    """Nothing can be ranked by the score of a mixture whose loss, or outputs, are not finite."""
    for name, value in scores.items():
        if not math.isfinite(value):
            raise UserError(f"the score of {name} is {value}", where=where, fix=fix)


def _chosen(
    args: argparse.Namespace,
    scores: Mapping[str, float],
    units: Mapping[str, Sequence[str]],
    probe: Probe | None,
    passes: Passes,
) -> list[str]:
    """Names of the units that keep their mixers."""
    from dsmixer.evaluation.layer_scores import fewest, most_tries, ranking

    order = ranking(scores)
    if args.max_loss_rise is not None:
        assert probe is not None
        what = f"finding how many {args.by}s it takes"
        with passes.of(what, most_tries(len(units)) * probe.num_batches):
            return fewest(probe, units, order, args.max_loss_rise)[0]
    number = args.keep if args.keep is not None else max(1, round(args.share * len(order)))
    if number >= len(order):
        problem = f"{number} of {len(order)} {args.by}s with mixers would be kept: nothing to prune"
        where = "--keep" if args.keep is not None else "--share"
        raise UserError(problem, where=where, fix="keep fewer, or prune by mixer")
    return order[:number]


def _losses(
    probe: Probe,
    units: Mapping[str, Sequence[str]],
    names: Sequence[str],
    scores: Mapping[str, Any],
    passes: Passes,
) -> dict[str, Any]:
    """Of the base, the mixture and the pruned one, and on how many examples; whether those of the scores."""
    pruned = [path for name, paths in units.items() if name not in names for path in paths]
    every = [path for paths in units.values() for path in paths]
    known = scores["rows"]  # by earlier versions it is not told
    as_scored = None if known is None else known == _digest_of_rows(probe)
    told = {"num_examples": len(probe.sheet.examples), "as_scored": as_scored}
    with passes.of("measuring the loss", 3 * probe.num_batches):
        found = {"base": probe.loss(every), "full": probe.loss(), "pruned": probe.loss(pruned)}
    return {**found, **told}


def _write(
    args: argparse.Namespace,
    mixture: Mixture,
    source: Path,
    tokenizer: Any,
    units: Mapping[str, Sequence[str]],
    names: Sequence[str],
    scores: Mapping[str, Any],
    losses: Mapping[str, Any] | None,
) -> Pruned:
    from dsmixer.adapters.pruning import prune_mixture

    why = f"chosen by {args.by}, score `{scores['score']}` on {scores['num_examples']} held-out examples"
    if losses is not None:
        why += (
            f"; loss {_on(losses)}, nats a target token, mean over domains: {losses['base']:.4f} without "
            f"mixers, {losses['full']:.4f} with all, {losses['pruned']:.4f} with these"
        )
    kept = [path for name, paths in units.items() if name in names for path in paths]
    return prune_mixture(mixture, source, kept, args.out, tokenizer=tokenizer, units=units, why=why)


def _print(
    args: argparse.Namespace,
    mixture: Mixture,
    units: Mapping[str, Sequence[str]],
    names: Sequence[str],
    scores: Mapping[str, Any],
    losses: Mapping[str, Any] | None,
    written: Pruned,
) -> None:
    from dsmixer.adapters.pruning import num_weights

    weights = {"full": num_weights(mixture), "pruned": written.weights}
    if args.json:
        values = {
            "folder": str(written.folder),
            **{key: scores[key] for key in ("by", "score", "num_examples")},
            "kept": [name for name in units if name in names],
            "pruned": [name for name in units if name not in names],
            "scores": scores["units"],
            "losses": losses,
            "weights": weights,
            "notes": list(written.notes),
        }
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(args.by, "projections", scores["score"], "kept")
    for name, paths in units.items():
        mark = "yes" if name in names else ""
        table.add_row(name, str(len(paths)), f"{scores['units'][name]:.5f}", mark)
    Console().print(table)
    print(f"mixture: {written.folder}")
    print(f"weights: {weights['pruned']:,} of {weights['full']:,} of experts and routers")
    if losses is not None:
        told = ", ".join(f"{name} {losses[key]:.4f}" for key, name in _LOSSES.items())
        print(f"loss:    {told} (nats a target token, mean over domains, {_on(losses)})")
    for note in written.notes:
        print(f"note: {note}")


def _on(losses: Mapping[str, Any]) -> str:
    """Where the losses were measured, beside the scores."""
    if losses["as_scored"]:
        return "on the rows of the scores"
    others = ", which are not those of the scores" if losses["as_scored"] is False else ""
    return f"on {losses['num_examples']} examples{others}"


_LOSSES = {"base": "without mixers", "full": "with all", "pruned": "with those kept"}


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value:g} is not between 0 and 1")
    return value


def _rise(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value:g} is not at least 0")
    return value
