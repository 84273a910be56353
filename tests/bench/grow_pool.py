"""Add an expert to a published mixture of five, retrain its rows of the routers on 200 examples, compare.

    python tests/bench/grow_pool.py WORK_FOLDER [--short] [section.key=value ...]

On the small real model and benchmarks beside the checkout (``../shared``; elsewhere: ``--shared``). Five
experts and their routers are trained by a recipe, a sixth expert by itself on a domain that the five do not
know, each under the real launcher. The sixth is added as ``dsmixer pool add`` does, and
``launch/recipes/retrain_router.yaml`` trains its rows on 200 examples over all six domains. Figures: held-out
loss, nats a target token, of every domain with the five, after adding, and after retraining. What is done in
the work folder is not repeated; ``grow_pool.json`` there keeps the figures.
A second retraining: ``--name other run.seed=1``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dsmixer.adapters.loading import load_mixture
from dsmixer.adapters.pools import add_experts
from dsmixer.adapters.router_rows import starts
from dsmixer.config.schema import DataConfig
from dsmixer.data.domains import load_domains
from dsmixer.data.encode import pad_token_id
from dsmixer.evaluation.methods import routed_as
from dsmixer.evaluation.scoring import domain_rows, score_rows
from dsmixer.evaluation.sheet import make_sheet

REPOSITORY = Path(__file__).parents[2]
OLD, NEW = ["sst2", "cola", "qnli", "arc_easy", "mbpp"], "gsm8k"
MODEL = "english-7m"
Losses = dict[str, float]


def main() -> None:
    """Train, add, retrain, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of the runs and figures")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared")
    parser.add_argument("--short", action="store_true", help="a few steps and test examples only")
    parser.add_argument("--starts", action="store_true", help="compare ways to start the new rows, too")
    parser.add_argument("--name", default="retrained", help="of the retraining's run")
    parser.add_argument("retrain", nargs="*", help="section.key=value over the recipe of the retraining")
    args = parser.parse_intermixed_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.work, args.shared, args.short)
    figures = bench.run(args.name, args.retrain, list(starts) if args.starts else ["mean"])
    (args.work / "grow_pool.json").write_text(json.dumps(figures, indent=2))
    print_table(figures)


class Bench:
    """The runs of one work folder."""

    def __init__(self, work: Path, shared: Path, short: bool) -> None:
        self.work, self.shared, self.short = work.resolve(), shared.resolve(), short
        self.num_test = 8 if short else 200

    def run(self, retraining: str, overrides: Sequence[str], ways: Sequence[str]) -> dict[str, Any]:
        """All figures, by what was scored and domain."""
        five = self.train("five", self.from_scratch(OLD))
        own = self.train("own", {**self.from_scratch([NEW]), "stage2": {"enabled": False}})
        found: dict[str, Losses] = {"base": self.scored(five, "base", [NEW]), "five": self.scored(five)}
        for way in ways:
            out = self.work / f"added_{way}"
            if not out.is_dir():
                add_experts(five, {NEW: own / "experts" / NEW}, out, start=way)
            found[f"added, {way}"] = self.scored(out)
        grown = self.work / "added_mean"
        for name in (*OLD, NEW):
            found[f"expert:{name}"] = self.scored(grown, f"expert:{name}", [name])
        retrained = self.train(retraining, self.retraining(grown), overrides)
        found["retrained"] = self.scored(retrained)
        return {"losses": found, "num_test": self.num_test, "overrides": list(overrides)}

    def scored(self, mixture: Path, method: str = "mixture", names: Sequence[str] = (*OLD, NEW)) -> Losses:
        """``score``, once for a mixture in the work folder."""
        kept = self.work / "scores.json"
        scores = json.loads(kept.read_text()) if kept.is_file() else {}
        key = f"{mixture.relative_to(self.work)} {method} {' '.join(names)}"
        if key not in scores:
            scores[key] = self.score(mixture, method, names)
            kept.write_text(json.dumps(scores, indent=2))
            print(key, scores[key], flush=True)
        found: Losses = scores[key]
        return found

    def domains(self, names: Sequence[str]) -> list[dict[str, Any]]:
        data = self.shared / "data"
        return [
            {
                "name": name,
                "train": str(data / name / "train.jsonl"),
                "test": str(data / name / "test.jsonl"),
                "max_train": 1000,
                "max_test": self.num_test,
            }
            for name in names
        ]

    def recipe(self, names: Sequence[str]) -> dict[str, Any]:
        return {
            "run": {"dir": str(self.work / "runs"), "seed": 0, "tensorboard": False},
            "base": {"model": str(self.shared / "models" / MODEL), "dtype": "float32"},
            "data": {"max_length": 256, "domains": self.domains(names)},
            "checkpoint": {"every": 1000},
            "evaluation": {"enabled": False},
        }

    def from_scratch(self, names: Sequence[str]) -> dict[str, Any]:
        """Both stages, so many rows a step as there are domains, twice."""
        rows = 2 * max(2, len(names))
        return {
            **self.recipe(names),
            "mixer": {"rank": 16, "alpha": 32, "dropout": 0.0},
            "stage1": {
                "learning_rate": 2e-3,
                "max_steps": 4 if self.short else 80,
                "micro_batch_size": rows,
                "global_batch_size": rows,
            },
            "stage2": {
                "learning_rate": 3e-4,
                "router_learning_rate": 1e-2,
                "max_steps": 4 if self.short else 50,
                "micro_batch_size": 8,
                "global_batch_size": 8,
                "data": {"max_examples": 600},
            },
        }

    def retraining(self, mixture: Path) -> dict[str, Any]:
        """The shipped recipe, on the mixture and data of this bench."""
        recipe = yaml.safe_load((REPOSITORY / "launch" / "recipes" / "retrain_router.yaml").read_text())
        recipe["run"] |= {"dir": str(self.work / "runs"), "tensorboard": False}
        recipe["base"]["model"] = str(self.shared / "models" / MODEL)
        recipe["mixer"]["mixture"] = str(mixture)
        recipe["evaluation"] = {"enabled": False}
        for domain in recipe["data"]["domains"]:
            for part in ("train", "test"):
                domain[part] = str(self.shared / "data" / domain["name"] / f"{part}.jsonl")
        if self.short:
            recipe["stage2"]["max_steps"] = 3
        return dict(recipe)

    def train(self, name: str, recipe: dict[str, Any], overrides: Sequence[str] = ()) -> Path:
        """The mixture of a run under the launcher, which trains it where it is not finished."""
        published = self.work / "runs" / name / "mixture"
        if (published.parent / "report" / "index.html").is_file():
            return published
        path = self.work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "1"]
        command = [str(REPOSITORY / "launch" / "train.py"), "--config", str(path), f"run.name={name}"]
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "DS_ACCELERATOR": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
            "MASTER_PORT": "29533",
        }
        subprocess.run([*launcher, *command, *overrides], check=True, env={**os.environ, **environment})
        return published

    def score(self, mixture: Path, method: str = "mixture", names: Sequence[str] = (*OLD, NEW)) -> Losses:
        """Held-out loss of each domain, nats a target token."""
        model, tokenizer = load_mixture(mixture)
        config = DataConfig(max_length=256, domains=self.domains(names))
        domains = load_domains(config, seed=0, quarantine=None)
        sheet = make_sheet(domains, tokenizer, max_length=256, max_examples=None, seed=0)
        everywhere = tuple(range(len(sheet.domains)))
        with routed_as(model, method):
            scores = score_rows(
                model,
                sheet,
                sheet.rows(everywhere),
                batch_size=16,
                pad_token_id=pad_token_id(tokenizer),
                end_token_id=tokenizer.eos_token_id,
            )
        rows = domain_rows(sheet, scores, method, everywhere)
        return {str(row["domain"]): float(row["value"]) for row in rows if row["metric"] == "loss"}  # type: ignore[arg-type]


def print_table(figures: dict[str, Any]) -> None:
    """Losses by domain, and what retraining cost and brought."""
    losses = figures["losses"]
    shown = [name for name in losses if not name.startswith("expert:") and name != "base"]
    print("| domain | own expert | " + " | ".join(shown) + " | retrained against five |")
    print("|" + "---|" * (len(shown) + 3))
    for domain in (*OLD, NEW):
        cells = [losses[f"expert:{domain}"][domain], *(losses[name][domain] for name in shown)]
        change = 100 * (losses["retrained"][domain] / losses["five"][domain] - 1)
        print(f"| {domain} | " + " | ".join(f"{cell:.4f}" for cell in cells) + f" | {change:+.2f} % |")
    base, own, now = losses["base"][NEW], losses[f"expert:{NEW}"][NEW], losses["retrained"][NEW]
    print(f"{NEW}: {100 * (base - now) / (base - own):.1f} % of its own expert's gain recovered")


if __name__ == "__main__":
    main()
