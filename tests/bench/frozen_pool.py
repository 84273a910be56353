"""Ready-made adapters under a router of their own: five LoRAs by plain PEFT, imported frozen.

    python -m tests.bench.frozen_pool --shared ../shared --out runs/frozen_pool

The train part of each of five benchmarks is cut into rows for an adapter, rows for the routers and rows on
which a learning rate may be chosen; no row is in two of them, and none is a test row. Five adapters of
unequal ranks, alphas and ways of scaling are trained by PEFT and transformers alone, each by itself. A recipe
imports them as they are saved, and the ``deepspeed`` launcher trains the routers on 2,000 mixed rows
without labels. Then everything answers the same held-out rows:

- base, every adapter on every benchmark, uniform and mixture: the run's own ``evaluation.json``;
- ``arrow``: PEFT's ``create_arrow_model`` over the same adapters, by the same scoring. Arrow wants one rank,
  so it gets copies filled up with zeros to the largest one, which compute the same;
- each adapter alone in PEFT, by the loss that transformers itself returns.

``--seeds`` adds runs with other router seeds, ``--also`` routers of other kinds; ``--choose`` compares
learning rates on the rows kept for that and stops. ``--short`` does the whole on few rows, to show that it
works. Everything is kept in the folder, and what is there is not made again; ``frozen_pool.json`` has all
figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from dsmixer.adapters.loading import load_mixture
from dsmixer.config.recipe import load_recipe
from dsmixer.data.collate import collate
from dsmixer.data.encode import pad_token_id
from dsmixer.evaluation.scoring import domain_rows, score_rows
from dsmixer.evaluation.sharing import batches_of
from dsmixer.evaluation.sheet import Sheet, make_sheet
from dsmixer.evaluation.table import routing_line
from dsmixer.model.load import load_tokenizer
from dsmixer.training.data import load_run_data
from tests.bench.frozen_pool_peft import arrow_model, arrow_refusal, lone_adapter
from tests.bench.frozen_pool_rows import LONG, NAMES, SHORT, Pool, Row, make_rows
from tests.support.launching import REPOSITORY, free_port, launch_environment

ROUTER_RATE = 1e-2
"""Peak learning rate of the routers, as in ``recipes/real_small.yaml``; ``--choose`` compares others."""
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
KINDS: dict[str, dict[str, Any]] = {
    "top2": {"stage2.top_k": 2},
    "top1": {"stage2.top_k": 1, "stage2.renormalize": False},
    "soft": {"stage2.routing": "soft"},
    "no_rsl": {"stage2.rsl.alpha": 0.0, "stage2.rsl.entropy_weight": 0.0},
}
BATCH_SIZE = 16


@dataclass(frozen=True)
class RouterRun:
    """One training of routers: its name and what differs from the recipe."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)


def main() -> None:
    """Make what is missing, score, print."""
    args = parsed()
    pool = Pool(args.shared.resolve(), args.out.resolve(), SHORT if args.short else LONG, args.ranks)
    make_rows(pool)
    train_adapters(pool)
    if args.choose:
        choose(pool)
        return
    first = RouterRun("routers")
    others = [RouterRun(f"seed{seed}", {"run.seed": seed}) for seed in args.seeds]
    others += [RouterRun(kind, KINDS[kind]) for kind in args.also]
    train_routers(pool, first, evaluate=True)
    for run in others:
        train_routers(pool, run, evaluate=False)
    result = compare(pool, first, others)
    (pool.out / "frozen_pool.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = REPOSITORY.parent / "shared"
    parser.add_argument("--shared", type=Path, default=shared, help="folder of the benchmarks and the base")
    parser.add_argument("--out", type=Path, default=Path("runs/frozen_pool"), help="folder for everything")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train the routers")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="further seeds of the routers")
    parser.add_argument("--also", nargs="*", default=[], choices=KINDS, help="further kinds of routers")
    parser.add_argument("--choose", action="store_true", help="compare learning rates and stop")
    parser.add_argument("--short", action="store_true", help="few rows")
    return parser.parse_args()


def train_adapters(pool: Pool) -> None:
    """The adapters that are not there yet, by two processes at a time."""
    missing = [name for name in NAMES if not (pool.adapter(name) / "adapter_config.json").is_file()]
    began = time.perf_counter()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.frozen_pool_adapters", *names]
            + ["--base", str(pool.base), "--pool", str(pool.out)],
            cwd=REPOSITORY,
            env=launch_environment(),
        )
        for names in (missing[0::2], missing[1::2])
        if names
    ]
    assert [process.wait() for process in processes] == [0] * len(processes), "an adapter failed"
    if missing:
        print(f"adapters: {time.perf_counter() - began:.0f} s", flush=True)


def recipe(pool: Pool, run: RouterRun, test: str) -> dict[str, Any]:
    """The recipe of a router run: adapters as they lie, frozen, no stage one."""
    domains = [
        {"name": name, "train": str(pool.rows(name, "adapter")), "test": str(pool.rows(name, test))}
        for name in NAMES
    ]
    return {
        "run": {"name": run.name, "dir": str(pool.run(run.name).parent), "tensorboard": False},
        "base": {"model": str(pool.base), "dtype": "float32"},
        "data": {"max_length": 512, "domains": domains},
        "mixer": {
            "dropout": 0.0,
            "experts": [{"name": name, "path": str(pool.adapter(name))} for name in NAMES],
        },
        "stage1": {"enabled": False},
        "stage2": {
            "experts": "frozen",
            "learning_rate": ROUTER_RATE,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "data": {"source": str(pool.mixed)},
        },
        "checkpoint": {"every": 1000},
        "evaluation": {"exact_match": False, "batch_size": BATCH_SIZE},
    }


def train_routers(pool: Pool, run: RouterRun, *, evaluate: bool, test: str = "test") -> None:
    """One run under the launcher; a finished one says so and ends."""
    path = pool.out / "recipes" / f"{run.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe(pool, run, test), sort_keys=False), encoding="utf-8")
    began = time.perf_counter()
    subprocess.run(
        [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(pool.ranks)]
        + ["--master_port", str(free_port()), "launch/train.py", "--config", str(path)]
        + [f"evaluation.enabled={json.dumps(evaluate)}"]
        + [f"{key}={json.dumps(value)}" for key, value in run.changes.items()],
        cwd=REPOSITORY,
        env=launch_environment(),
        check=True,
    )
    print(f"{run.name}: {time.perf_counter() - began:.0f} s", flush=True)


@dataclass(frozen=True)
class Scorer:
    """The test rows of a run, for any model over the same base."""

    sheet: Sheet
    tokenizer: Any

    def rows(self, model: nn.Module, method: str) -> list[Row]:
        """The figures of a method, scored as the run's own evaluation scores."""
        everywhere = range(len(self.sheet.domains))
        scores = score_rows(
            model.eval(),
            self.sheet,
            self.sheet.rows(everywhere),
            batch_size=BATCH_SIZE,
            pad_token_id=pad_token_id(self.tokenizer),
            end_token_id=self.tokenizer.eos_token_id,
        )
        return domain_rows(self.sheet, scores, method, everywhere)

    @torch.no_grad()
    def losses(self, model: nn.Module) -> dict[str, float]:
        """Nats a target token of each benchmark, from the loss that transformers returns for labels."""
        model.eval()
        return {name: self._loss(model, domain) for domain, name in enumerate(self.sheet.domains)}

    def _loss(self, model: nn.Module, domain: int) -> float:
        rows = [row for row in self.sheet.rows([domain]) if self.sheet.is_target_row[row]]
        total = count = 0.0
        for batch in batches_of(rows, self.sheet.store.lengths.tolist(), BATCH_SIZE):
            micro = collate(self.sheet.store, [(row,) for row in batch], pad_token_id(self.tokenizer))
            loss = model(input_ids=micro.input_ids, labels=micro.labels, use_cache=False).loss
            total, count = total + float(loss) * micro.num_targets, count + micro.num_targets
        return total / count


def scorer_of(pool: Pool, run: RouterRun) -> Scorer:
    """The test rows of a run, tokenised as it did."""
    loaded = load_recipe(pool.run(run.name) / "config.yaml").recipe
    domains = load_run_data(loaded, None).domains
    tokenizer = load_tokenizer(loaded.base.model)
    sheet = make_sheet(domains, tokenizer, max_length=loaded.data.max_length, max_examples=None)
    return Scorer(sheet, tokenizer)


def choose(pool: Pool) -> None:
    """The mixture's loss on the rows kept for that, for each rate."""
    found = {}
    for rate in RATES:
        run = RouterRun(f"rate_{rate:g}", {"stage2.learning_rate": rate})
        train_routers(pool, run, evaluate=False, test="choose")
        model, _ = load_mixture(pool.run(run.name) / "mixture")
        found[f"{rate:g}"] = scorer_of(pool, run).losses(model)
    print_table("loss on the rows for choosing, by learning rate", found)


def compare(pool: Pool, first: RouterRun, others: Sequence[RouterRun]) -> dict[str, Any]:
    """All figures: the run's own, those of Arrow and PEFT on the same rows, those of the other runs."""
    evaluation = json.loads((pool.run(first.name) / "evaluation.json").read_text(encoding="utf-8"))
    scorer, rows = scorer_of(pool, first), list(evaluation["rows"])
    arrow = arrow_model(pool)
    rows += scorer.rows(arrow, "arrow")
    with arrow.disable_adapter():
        base = cells(scorer.rows(arrow, "base"), "loss")["base"]
    for run in others:
        model, _ = load_mixture(pool.run(run.name) / "mixture")
        rows += scorer.rows(model, run.name)
    loss = cells(rows, "loss")
    alone = {name: scorer.losses(lone_adapter(pool, name)) for name in NAMES}
    return {
        "rows": rows,
        "routing": evaluation["routing"],
        "arrow_refuses": arrow_refusal(pool),
        "alone_in_peft": alone,
        "base_in_peft": base,
        "expert_difference": max(apart(loss[f"expert:{name}"], alone[name]) for name in NAMES),
        "base_difference": apart(loss["base"], base),
    }


def apart(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The largest relative difference over the benchmarks."""
    return max(abs(ours[name] - theirs[name]) / abs(theirs[name]) for name in theirs)


def cells(rows: Sequence[Row], metric: str) -> dict[str, dict[str, float]]:
    """One metric by method and benchmark."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] == metric:
            found.setdefault(row["method"], {})[row["domain"]] = row["value"]
    return found


def show(result: Mapping[str, Any]) -> None:
    """Loss, recovered share, accuracy, every adapter on every benchmark, and the differences to PEFT."""
    loss = with_own(cells(result["rows"], "loss"))
    print_table("held-out loss, nats a target token", without_experts(loss))
    print_table("share of the own adapter's gain", recovered(without_experts(loss)))
    print_table("loss of every adapter everywhere", {f"expert:{n}": loss[f"expert:{n}"] for n in NAMES})
    print_table("accuracy of the choice", without_experts(with_own(cells(result["rows"], "accuracy"))))
    print(f"Arrow on the adapters as they are: {result['arrow_refuses'] or 'accepted'}")
    print(f"expert:NAME against PEFT alone, largest relative difference: {result['expert_difference']:.1e}")
    print(f"base against the base inside PEFT: {result['base_difference']:.1e}")
    print(routing_line(result["routing"]))


def with_own(columns: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """A column more: each benchmark's own adapter."""
    return {**columns, "own adapter": {name: columns[f"expert:{name}"][name] for name in columns["base"]}}


def without_experts(columns: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {method: values for method, values in columns.items() if not method.startswith("expert:")}


def recovered(columns: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """(base - method) / (base - own adapter)."""
    base, own = columns["base"], columns["own adapter"]
    return {
        method: {name: (base[name] - values[name]) / (base[name] - own[name]) for name in base}
        for method, values in columns.items()
        if method not in ("base", "own adapter")
    }


def print_table(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    """Benchmarks down and their mean last, methods across."""
    table = Table("", *columns, title=title, title_justify="left")
    names = list(next(iter(columns.values())))
    for name in names:
        table.add_row(name, *(f"{values[name]:.4f}" for values in columns.values()))
    means = (sum(values.values()) / len(names) for values in columns.values())
    table.add_row("mean", *(f"{mean:.4f}" for mean in means))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
