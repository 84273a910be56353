"""``top_p`` routing against ``topk``: held-out loss and experts a token, on the same experts and routers.

    deepspeed --num_accelerators 2 launch/train.py --config launch/recipes/real_small.yaml
    python -m tests.bench.top_p runs/real_small WORK_FOLDER

The run's own routers, trained with ``topk`` and K = 3, are scored with each way put in its place: ``topk``
with K = 1, 2 and 3, ``top_p`` with masses of 0.5, 0.7 and 0.9; on the rows that ``tests/bench/prune.py``
judges by. With ``--train`` also routers that were trained in each way, under the launcher: on the run's
experts, frozen, from the same start, on a part of the run's router rows, which stage one has not seen (K = 1
without renormalising, for its weight would be 1 always). ``top_p.json`` in the work folder keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dsmixer.adapters.loading import load_mixture
from dsmixer.data.encode import pad_token_id
from dsmixer.evaluation.routing_analysis import RoutingCounts, recorder
from dsmixer.evaluation.scoring import score_rows
from dsmixer.evaluation.sharing import device_of
from dsmixer.model.inject import mixture_of, route_by, route_to
from dsmixer.routing.modes import Routing
from tests.bench.grow_pool import Bench
from tests.bench.prune import BATCH_SIZE, SIX, Losses, Rows, add_arguments, losses_of, mean, recovered

WAYS: dict[str, dict[str, Any]] = {
    "topk1": {"routing": "topk", "top_k": 1, "renormalize": False},
    "topk2": {"routing": "topk", "top_k": 2},
    "topk3": {"routing": "topk", "top_k": 3},
    "top_p0.5": {"routing": "top_p", "top_p": 0.5},
    "top_p0.7": {"routing": "top_p", "top_p": 0.7},
    "top_p0.9": {"routing": "top_p", "top_p": 0.9},
}


def main() -> None:
    """Train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--train", action="store_true", help="train routers in each way, too")
    parser.add_argument("--examples", type=int, default=300, help="that the routers are trained on")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    study = Study(args)
    figures = study.figures()
    (study.work / "top_p.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print_figures(figures)


class Study:
    """One work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.rows = args, args.work, Rows(args)
        self.bench = Bench(args.work, args.shared, short=False)
        self.work.mkdir(parents=True, exist_ok=True)

    def figures(self) -> dict[str, Any]:
        """Losses and experts a token by way, put in the place of another and trained so."""
        instead = self.kept("instead", self.instead)
        bounds = self.kept("bounds", self.bounds)
        trained = {way: self.trained(way) for way in WAYS if self.args.train}
        return {"bounds": bounds, "instead": instead, "trained": trained}

    def recipe(self, way: str) -> dict[str, Any]:
        """The run's experts, frozen, under fresh routers; rows as the run kept them from stage one."""
        recipe = self.bench.recipe(SIX)
        for entry in recipe["data"]["domains"]:
            del entry["max_train"]
        experts = self.args.run.resolve() / "mixture" / "experts"
        adapters = [{"name": name, "path": str(experts / name)} for name in SIX]
        recipe["mixer"] = {"experts": adapters, "dropout": 0.0}
        recipe["stage1"] = {"enabled": False}
        recipe["stage2"] = {
            **WAYS[way],
            "experts": "frozen",
            "learning_rate": 1e-2,
            "epochs": self.args.epochs,
            "micro_batch_size": 4,
            "global_batch_size": 4,
            "data": {"held_out": 2000, "max_examples": self.args.examples},
        }
        return recipe

    def trained(self, way: str) -> dict[str, Any]:
        """A way as it was trained."""

        def work() -> dict[str, Any]:
            folder = self.bench.train(way, self.recipe(way))
            model, tokenizer = load_mixture(folder)
            return self.scored(model, tokenizer, mixture_of(model).config.default_routing())

        return self.kept(f"trained {way}", work)

    def instead(self) -> dict[str, Any]:
        """Every way on the run's own routers."""
        model, tokenizer = load_mixture(self.args.run / "mixture")
        found = {}
        for way, settings in WAYS.items():
            chosen = {"top_k": 3, "top_p": 0.9, **settings, "mode": settings["routing"], "renormalize": True}
            del chosen["routing"]
            found[way] = self.scored(model, tokenizer, Routing(**chosen))
        return found

    def bounds(self) -> dict[str, Losses]:
        """Base and own experts."""
        model, tokenizer = load_mixture(self.args.run / "mixture")
        with route_to(model, None):
            base = self.losses(model, tokenizer, SIX)
        own: Losses = {}
        for name in SIX:
            with route_to(model, name):
                own |= self.losses(model, tokenizer, [name])
        return {"base": base, "own": own}

    def scored(self, model: Any, tokenizer: Any, routing: Routing) -> dict[str, Any]:
        """Loss by domain, and experts a real token, mean over routers."""
        mixture, sheet = mixture_of(model), self.rows.sheet("judged", tokenizer)
        counts = RoutingCounts(mixture, sheet.own_experts, device_of(model))
        with route_by(model, routing):
            losses = self.losses(model, tokenizer, SIX, recorder(mixture, sheet, counts))
        chosen_M = counts.chosen_ME.sum(1) / counts.tokens_M
        entropy_M = counts.entropy_M / counts.tokens_M
        return {
            "losses": losses,
            "experts": float(chosen_M.mean()),
            "least": float(chosen_M.min()),
            "most": float(chosen_M.max()),
            "entropy": float(entropy_M.mean()),
        }

    def losses(self, model: Any, tokenizer: Any, names: Sequence[str], around: Any = None) -> Losses:
        sheet = self.rows.sheet("judged", tokenizer)
        places = tuple(place for place, name in enumerate(sheet.domains) if name in names)
        scores = score_rows(
            model,
            sheet,
            [row for row in sheet.rows(places) if sheet.is_target_row[row]],
            batch_size=BATCH_SIZE,
            pad_token_id=pad_token_id(tokenizer),
            end_token_id=tokenizer.eos_token_id,
            around=around,
        )
        return losses_of(sheet, scores, places)

    def kept(self, name: str, work: Any) -> Any:
        """What ``work`` finds, once for a name in the work folder."""
        path = self.work / "top_p_figures.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if name not in found:
            found[name] = work()
            path.write_text(json.dumps(found, indent=1))
            print(f"{time.strftime('%X')} {name}", flush=True)
        return found[name]


def print_figures(figures: Mapping[str, Any]) -> None:
    """The table of docs/routing.md."""
    base, own = (figures["bounds"][name] for name in ("base", "own"))
    print(f"\nbase {mean(base):.4f}, own experts {mean(own):.4f} nats")
    for kind in ("instead", "trained"):
        if figures[kind]:
            print(
                f"\n| routing, {kind} | nats | recovered | experts a token | entropy |\n|---|---|---|---|---|"
            )
        for way, of in figures[kind].items():
            share, entropy = recovered(of["losses"], base, own), of["entropy"]
            experts = f"{of['experts']:.2f} ({of['least']:.2f} to {of['most']:.2f})"
            print(f"| {way} | {mean(of['losses']):.4f} | {share:.1f} % | {experts} | {entropy:.2f} |")


if __name__ == "__main__":
    main()
