"""A trained mixture pruned to three quarters, half and a quarter of its layers: weights, time, held-out loss.

    deepspeed --num_accelerators 2 launch/train.py --config launch/recipes/real_small.yaml
    python -m tests.bench.prune runs/real_small WORK_FOLDER

The run's model and benchmarks lie beside the checkout (``../shared``; elsewhere: ``--shared``). Of the test
part of each benchmark some rows are taken to score layers and mixers on, by each of the scores of
``dsmixer.evaluation.layer_scores``, and others to judge what is left: no row is in both. Figures:

- rank correlation of each score with the exact one, by layer (by mixer, too: ``--by-mixer``), and seconds;
- held-out loss and share of the own experts' gain recovered, when each score chooses the layers, and when
  they are drawn at random;
- weights, and times of a forward pass and of a decoded token, of the folders that ``dsmixer prune`` writes.

What is done in the work folder is not repeated; ``prune.json`` there keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsmixer.adapters.loading import load_mixture
from dsmixer.adapters.pruning import num_weights, prune_mixture
from dsmixer.config.schema import DataConfig
from dsmixer.data.domains import load_domains
from dsmixer.data.encode import pad_token_id
from dsmixer.evaluation.layer_scores import DEFAULT, Probe, methods, ranking, units_of
from dsmixer.evaluation.methods import routed_as
from dsmixer.evaluation.mixer_gates import without
from dsmixer.evaluation.scoring import domain_rows, score_rows
from dsmixer.evaluation.sheet import Sheet, make_sheet
from dsmixer.model.inject import mixture_of, route_to
from tests.bench.decode import PROMPT_TOKENS, WARM_UP
from tests.bench.decoding import Decoding
from tests.bench.grow_pool import REPOSITORY
from tests.bench.timing import in_rounds, ratios, spread, turn_of

SIX = ["sst2", "cola", "gsm8k", "mbpp", "arc_easy", "qnli"]
SHARES = (0.75, 0.5, 0.25)
DRAWS = 3
MAX_LENGTH, BATCH_SIZE = 512, 16
Losses = dict[str, float]


def main() -> None:
    """Train, score, prune, judge, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--by-mixer", action="store_true", help="score and prune single mixers, too")
    args = parser.parse_args()
    study = Study(args)
    figures = study.figures()
    (study.work / "prune.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print_figures(figures)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run, the figures and the data are, and how many rows count."""
    parser.add_argument("run", type=Path, help="a run of launch/recipes/real_small.yaml")
    parser.add_argument("work", type=Path, help="folder of rows and figures")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared")
    parser.add_argument("--scored", type=int, default=30, help="rows a benchmark to score on")
    parser.add_argument("--judged", type=int, default=60, help="other rows a benchmark to judge by")
    parser.add_argument("--turns", type=int, default=100, help="of the timing")


class Rows:
    """Test rows of the benchmarks, cut in two."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder, self.shared = args.work / "rows", args.shared
        self.counts = {"scored": args.scored, "judged": args.judged}

    def sheet(self, part: str, tokenizer: Any) -> Sheet:
        """``scored`` or ``judged`` rows, tokenised."""
        entries = []
        for name in SIX:
            path = self.folder / part / f"{name}.jsonl"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(self._cut(name)[part]), encoding="utf-8")
            entries.append({"name": name, "train": str(path), "test": str(path)})
        domains = load_domains(DataConfig(domains=tuple(entries)), seed=0, quarantine=None)
        return make_sheet(domains, tokenizer, max_length=MAX_LENGTH, max_examples=None)

    def _cut(self, name: str) -> dict[str, list[str]]:
        path = self.shared / "data" / name / "test.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        random.Random(0).shuffle(lines)
        scored, judged = self.counts["scored"], self.counts["judged"]
        return {"scored": lines[:scored], "judged": lines[scored : scored + judged]}


class Study:
    """One work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.run, self.turns, self.by_mixer = args.work, args.run, args.turns, args.by_mixer
        self.rows = Rows(args)
        self.work.mkdir(parents=True, exist_ok=True)

    def figures(self) -> dict[str, Any]:
        """All of them."""
        folder = self.run / "mixture"
        self.model, self.tokenizer = load_mixture(folder)
        self.judged = self.rows.sheet("judged", self.tokenizer)
        found: dict[str, Any] = {
            "rows": self.rows.counts,
            "base": self.kept("base", lambda: self.judge("base")),
            "own": self.kept("own", self.own),
            "full": self.kept("full", lambda: self.judge("mixture")),
        }
        scores = {"layer": self.kept("scores layer", lambda: self.scores("layer"))}
        pruned = {"layer": self.all_pruned("layer", scores["layer"])}
        best = scores["layer"][DEFAULT]["units"]
        found["folders"] = self.kept(f"folders {DEFAULT}", lambda: self.folders(folder, best))
        if self.by_mixer:
            scores["mixer"] = self.kept("scores mixer", lambda: self.scores("mixer"))
            pruned["mixer"] = self.all_pruned("mixer", scores["mixer"])
        correlation = {by: correlations(of) for by, of in scores.items()}
        return {**found, "scores": scores, "pruned": pruned, "correlation": correlation}

    def kept(self, name: str, work: Callable[[], Any]) -> Any:
        """What ``work`` finds, once for a name in the work folder."""
        path = self.work / "figures.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if name not in found:
            found[name] = work()
            path.write_text(json.dumps(found, indent=1))
            print(f"{time.strftime('%X')} {name}", flush=True)
        return found[name]

    def scores(self, by: str) -> dict[str, Any]:
        """Each score of each unit, and the seconds of the processor that it took."""
        sheet = self.rows.sheet("scored", self.tokenizer)
        probe = Probe(self.model, sheet, BATCH_SIZE, pad_token_id(self.tokenizer))
        units, found = units_of(mixture_of(self.model), by), {}
        for name, method in methods.items():
            start = time.process_time()
            found[name] = {"units": method(probe, units), "seconds": time.process_time() - start}
        return found

    def judge(self, method: str, names: Sequence[str] = SIX, pruned: Sequence[str] = ()) -> Losses:
        """Held-out loss of each domain, nats a target token."""
        places = tuple(place for place, name in enumerate(self.judged.domains) if name in names)
        with routed_as(self.model, method), without(mixture_of(self.model), pruned):
            scores = score_rows(
                self.model,
                self.judged,
                [row for row in self.judged.rows(places) if self.judged.is_target_row[row]],
                batch_size=BATCH_SIZE,
                pad_token_id=pad_token_id(self.tokenizer),
                end_token_id=self.tokenizer.eos_token_id,
            )
        return losses_of(self.judged, scores, places)

    def own(self) -> Losses:
        """Of each domain's own expert."""
        return {name: self.judge(f"expert:{name}", [name])[name] for name in SIX}

    def all_pruned(self, by: str, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Losses by share and by what chose the units."""
        units = units_of(mixture_of(self.model), by)
        found: dict[str, Any] = {}
        for share in SHARES:
            number = round(share * len(units))
            ways = {name: ranking(of["units"])[:number] for name, of in scores.items()}
            if by == "layer":
                ways |= {f"random {n}": random.Random(n).sample(list(units), number) for n in range(DRAWS)}
            found[f"{share:g}"] = {
                way: {"kept": kept, "losses": self.losses_with(by, units, kept)} for way, kept in ways.items()
            }
        return found

    def losses_with(self, by: str, units: Mapping[str, Sequence[str]], kept: Sequence[str]) -> Losses:
        pruned = [path for name, paths in units.items() if name not in kept for path in paths]
        name = f"{by} {' '.join(sorted(kept))}"
        found: Losses = self.kept(name, lambda: self.judge("mixture", pruned=pruned))
        return found

    def folders(self, source: Path, scores: Losses) -> dict[str, Any]:
        """Weights and times of what is written, beside the base and the whole mixture."""
        mixture = mixture_of(self.model)
        units = units_of(mixture, "layer")
        models = {"full": self.model}
        for share in SHARES:
            kept = ranking(scores)[: round(share * len(units))]
            out = self.work / f"pruned_{share:g}"
            if not out.is_dir():
                paths = [path for name in kept for path in units[name]]
                prune_mixture(mixture, source, paths, out, tokenizer=self.tokenizer, units=units)
            models[f"{share:g}"] = load_mixture(out)[0]
        base = load_mixture(source)[0]
        times = timed({"base": base, **models}, self.turns)
        weights = {name: num_weights(mixture_of(model)) for name, model in models.items()}
        parts = mixture.model.named_parameters()
        bare = sum(own.numel() for key, own in parts if ".bank." not in key and ".router." not in key)
        return {"weights": weights, "base_weights": bare, "times": times}


def losses_of(sheet: Sheet, scores: Any, places: Sequence[int]) -> Losses:
    """Loss by domain."""
    right = domain_rows(sheet, scores, "any", places)
    return {str(row["domain"]): float(row["value"]) for row in right if row["metric"] == "loss"}  # type: ignore[arg-type]


@torch.no_grad()
def timed(models: Mapping[str, Any], turns: int) -> dict[str, Any]:
    """Median milliseconds of a forward pass of 128 tokens and of a decoded token, in turns, and the
    median of the ratios to the whole mixture's in the same turn, with quartiles."""
    ids = torch.randint(3, 4000, (1, 128), generator=torch.Generator().manual_seed(0))
    with route_to(models["base"], None):
        works: dict[str, dict[str, Callable[[], object]]] = {
            "forward": {
                name: partial(model, input_ids=ids, use_cache=False) for name, model in models.items()
            },
            "decode": {name: Decoding(model, 1, PROMPT_TOKENS).next_token for name, model in models.items()},
        }
        times = {}
        for kind, of in works.items():
            taking_turns = {name: turn_of(work, torch.get_num_threads()) for name, work in of.items()}
            in_rounds(taking_turns, WARM_UP)
            times[kind] = in_rounds(taking_turns, turns)
    return {kind: {name: _timing(own, of["full"]) for name, own in of.items()} for kind, of in times.items()}


def _timing(own: Sequence[float], full: Sequence[float]) -> dict[str, float]:
    ratio = ratios(own, full)
    return {"ms": 1e3 * spread(own).median, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}


def correlations(scores: Mapping[str, Any]) -> dict[str, float]:
    """Spearman's rank correlation of each score with the exact one."""
    exact = _ranks(scores["ablation"]["units"])
    return {name: float(np.corrcoef(_ranks(of["units"]), exact)[0, 1]) for name, of in scores.items()}


def _ranks(values: Mapping[str, float]) -> np.ndarray:
    return np.argsort(np.argsort(list(values.values())))


def mean(losses: Losses) -> float:
    """Over domains."""
    return statistics.fmean(losses.values())


def recovered(losses: Losses, base: Losses, own: Losses) -> float:
    """Share of the own experts' gain, per cent, mean over domains."""
    return 100 * statistics.fmean((base[d] - losses[d]) / (base[d] - own[d]) for d in losses)


def print_figures(figures: Mapping[str, Any]) -> None:
    """The tables of docs/pruning.md."""
    base, own, full = (figures[name] for name in ("base", "own", "full"))
    print(f"\nbase {mean(base):.4f}, own experts {mean(own):.4f}, mixture {mean(full):.4f} nats")
    for by, of_score in figures["correlation"].items():
        print(f"\n| score, by {by} | correlation | seconds |\n|---|---|---|")
        for name, value in of_score.items():
            print(f"| `{name}` | {value:.2f} | {figures['scores'][by][name]['seconds']:.1f} |")
    for by, of_share in figures["pruned"].items():
        print(f"\nby {by}:\n| chosen by | " + " | ".join(f"{100 * float(s):g} %" for s in of_share) + " |")
        print("|" + "---|" * (1 + len(of_share)))
        for name in methods:
            found = [of[name]["losses"] for of in of_share.values()]
            cells = [f"{mean(losses):.4f} ({recovered(losses, base, own):.1f} %)" for losses in found]
            print(f"| `{name}` | {' | '.join(cells)} |")
        if by == "layer":
            print(f"| random | {' | '.join(_random(of, base, own) for of in of_share.values())} |")
    folders = figures["folders"]
    print(
        "\n| layers | weights | share | forward | decode | loss | recovered |\n|---|---|---|---|---|---|---|"
    )
    for name in ("full", *(f"{share:g}" for share in SHARES)):
        losses = full if name == "full" else figures["pruned"]["layer"][name][DEFAULT]["losses"]
        weights = folders["weights"][name]
        cells = [f"{weights:,}", f"{100 * weights / folders['base_weights']:.2f} %"]
        cells += [_shown(folders["times"][kind][name]) for kind in ("forward", "decode")]
        cells += [f"{mean(losses):.4f}", f"{recovered(losses, base, own):.1f} %"]
        print(f"| {name} | {' | '.join(cells)} |")
    bare = [_shown(folders["times"][kind]["base"]) for kind in ("forward", "decode")]
    print(f"| base alone | 0 | 0 % | {' | '.join(bare)} | {mean(base):.4f} | 0 % |")


def _shown(timing: Mapping[str, float]) -> str:
    return f"{timing['ms']:.2f} ms, {timing['ratio']:.3f} ({timing['low']:.3f} to {timing['high']:.3f})"


def _random(of: Mapping[str, Any], base: Losses, own: Losses) -> str:
    found = [entry["losses"] for way, entry in of.items() if way.startswith("random")]
    values = sorted(mean(losses) for losses in found)
    share = statistics.fmean(recovered(losses, base, own) for losses in found)
    return f"{statistics.fmean(values):.4f}, {values[0]:.4f} to {values[-1]:.4f} ({share:.1f} %)"


if __name__ == "__main__":
    main()
