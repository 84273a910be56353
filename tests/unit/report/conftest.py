"""Small run folders with real files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dsmixer.config.yaml_text import dump_yaml

DOMAINS = ("law", "chess", "code")
LOSSES = {  # domain -> base, own expert, another expert, uniform, mixture
    "law": (2.0, 1.0, 2.4, 1.9, 1.1),
    "chess": (3.0, 1.0, 2.9, 2.5, 0.9),
    "code": (1.5, 1.1, 1.6, 1.45, 1.3),
}


def settings(domains: Sequence[str]) -> dict[str, object]:
    return {
        "run": {"name": "three_domains", "seed": 7},
        "base": {"model": "base/model", "dtype": "float32", "quantization": "none"},
        "data": {"max_length": 64, "domains": [{"name": name, "train": "x.jsonl"} for name in domains]},
        "mixer": {"targets": ["q", "v"], "rank": 4, "alpha": 8.0, "dropout": 0.0, "experts": None},
        "stage1": {"learning_rate": 0.01},
        "stage2": {"learning_rate": 0.002, "routing": "topk", "top_k": 2},
    }


def metrics_lines(num_steps: int = 30) -> list[str]:
    rows = []
    for stage in (1, 2):
        for step in range(1, num_steps + 1):
            row = {"stage": stage, "step": step, "loss": 2.0 / step + stage, "tokens_per_second": 100.0}
            if stage == 2:
                row |= {"task_loss": None if step == 4 else 2.0 / step, "load_variance": 0.5 / step}
                row |= {"routing_entropy": 1.0 / step, "entropy_limit": math.log(3), "p_variance": 0.01}
            rows.append(json.dumps(row))
    return [*rows, '{"stage": 2, "step": 31, "lo']


def evaluation(domains: Sequence[str]) -> dict[str, object]:
    rows = []
    for domain, losses in zip(domains, LOSSES.values(), strict=True):
        base, own, other, uniform, mixture = losses
        values = {"base": base, "uniform": uniform, "mixture": mixture}
        values |= {f"expert:{name}": own if name == domain else other for name in domains}
        for method, value in values.items():
            row = {"domain": domain, "method": method, "metric": "loss", "value": value, "num_examples": 1000}
            rows.append(row)
    for method, value in {"base": 0.25, "majority": 0.3, "mixture": 0.75}.items():
        row = {"domain": domains[0], "method": method, "metric": "accuracy", "value": value}
        rows.append({**row, "num_examples": 40})
    return {"rows": rows}


def routing(domains: Sequence[str]) -> dict[str, object]:
    routers = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1, 2) for name in "qv"]
    own = [0.4, 0.4, 0.8, 0.6, 0.9, 0.9]
    load = [[[share if e == d else (1 - share) / 2 for e in range(3)] for d in range(3)] for share in own]
    own_first = [[share] * 3 for share in own]
    names = list(domains)
    return {
        "routers": routers,
        "experts": names,
        "domains": names,
        "load": load,
        "own_first_share": own_first,
        "own_probability": [[share / 2] * 3 for share in own],
        "entropy": [1.0, 0.9, 0.6, 0.4, 0.2, 0.1],
        "summary": {"own_first_mean": 4 / 6, "own_first_later_layers_mean": 0.8, "entropy": 3.2 / 6},
    }


def plan() -> dict[str, object]:
    kinds = {"base": 2_000_000, "experts": 123_456, "activations": 5_000_000, "peak": 7_200_000}
    sent = {"gradients": 123_456, "tokens": 0, "total": 123_456}
    return {
        "mode": "replicate",
        "zero_stage": 1,
        "world_size": 2,
        "bytes_per_rank": {"stage1": kinds, "stage2": {**kinds, "routers": 4096}},
        "bytes_sent_per_step": {"stage1": sent, "stage2": sent},
        "reason": "it sends least",
    }


def examples(domains: Sequence[str], text: str = "Sue said\nyes") -> dict[str, object]:
    """Two texts a domain: at each token the own expert speaks loudest, and at the last one nobody is read."""
    texts = []
    for own, name in enumerate(domains):
        spoken = [[own, 0.75], [(own + 1) % len(domains), 0.25]]
        for _ in range(2):
            tokens: list[dict[str, object]] = [
                {
                    "id": index,
                    "text": piece,
                    "part": "prompt" if index < 2 else "answer",
                    "weights": spoken,
                    "entropy": 0.5,
                    "layers": [spoken, spoken[:1], []],
                }
                for index, piece in enumerate(text.replace(" ", "| ").split("|"))
            ]
            unread = {"id": 9, "text": "</s>", "part": "answer", "weights": None, "entropy": None}
            tokens.append({**unread, "layers": None})
            texts.append({"domain": name, "own_expert": name, "num_tokens": 40, "begin": 7, "tokens": tokens})
    layers = ["layer 0", "layer 1", "layer 2"]
    counts = {"num_domains": len(domains), "num_layers": 3}
    return {"experts": list(domains), "layers": layers, **counts, "texts": texts}


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """Write a run folder with the named parts (all unless told) over domains of the given names."""

    def write(
        folder: Path, *parts: str, domains: Sequence[str] = DOMAINS, text: str = "Sue said\nyes"
    ) -> Path:
        folder.mkdir()
        (folder / "config.yaml").write_text(dump_yaml(settings(domains)), encoding="utf-8")
        texts = {
            "metrics.jsonl": "\n".join(metrics_lines()),
            "evaluation.json": json.dumps(evaluation(domains)),
            "routing.json": json.dumps(routing(domains)),
            "plan.json": json.dumps(plan()),
            "examples.json": json.dumps(examples(domains, text)),
        }
        for part in parts or texts:
            (folder / part).write_text(texts[part], encoding="utf-8")
        return folder

    return write


@pytest.fixture
def make_run(tmp_path: Path, write_run: Callable[..., Path]) -> Callable[..., Path]:
    """The same, in a folder of the test."""

    def make(*parts: str, name: str = "run", **options: object) -> Path:
        return write_run(tmp_path / name, *parts, **options)

    return make
