"""Flan-T5's shape, as a user runs it: trained, scored by what it writes, published, and imported.

Two launches of two minutes, so by hand: DSMIXER_LONG=1.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from parity.cases import LONG
from support.launching import REPOSITORY, TIMEOUT_SECONDS, launch
from support.tiny import write_base

from dsmixer.cli.main import main

pytestmark = [
    pytest.mark.timeout(TIMEOUT_SECONDS),
    pytest.mark.skipif(not LONG, reason="long: DSMIXER_LONG=1"),
]

LETTERS = string.ascii_lowercase[:8]
ANSWERS = {
    "next": {f"next {a}": chr(ord(a) + 1) for a in LETTERS},
    "upper": {f"upper {a}": a.upper() for a in LETTERS},
}
"""Two tables to be learnt by heart; the base has never seen either."""


def write_domains(folder: Path) -> dict[str, Path]:
    """A file a table, and all of them in ``mixed.jsonl`` for the routers."""
    paths, mixed = {}, ""
    for name, table in ANSWERS.items():
        text = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in table.items())
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text(text)
        mixed += text
    (folder / "mixed.jsonl").write_text(mixed)
    return paths


def train(folder: Path, **changes: Any) -> Path:
    """A run of two ranks under the launcher; its folder."""
    stage = {"learning_rate": 0.01, "global_batch_size": 16, "micro_batch_size": 8}
    paths = write_domains(folder).items()
    domains = [{"name": name, "train": str(path), "test": str(path)} for name, path in paths]
    recipe = {
        "run": {"name": "toy", "dir": str(folder / "runs"), "seed": 1, "tensorboard": False},
        "base": {"model": str(folder / "base"), "dtype": "float32"},
        "data": {"max_length": 16, "packing": False, "domains": domains},
        "mixer": {"targets": ["q", "k", "v", "o"], "rank": 8, "alpha": 16, "dropout": 0.0},
        "stage1": {**stage, "max_steps": 60},
        "stage2": {
            **stage,
            "learning_rate": 0.001,
            "router_learning_rate": 0.05,
            "max_steps": 24,
            "top_k": 2,
            "data": {"source": str(folder / "mixed.jsonl")},
        },
        "evaluation": {"generate_max_new_tokens": 3},
    }
    recipe = {key: {**value, **changes.get(key, {})} for key, value in recipe.items()}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    launch(REPOSITORY / "launch" / "train.py", ["--config", str(path)], ranks=2).check()
    return folder / "runs" / str(recipe["run"]["name"])


def scores_of(run: Path) -> dict[tuple[str, str, str], float]:
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    return {(row["domain"], row["method"], row["metric"]): row["value"] for row in rows}


def losses_of(run: Path, stage: int) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["task_loss"] for row in rows if row["stage"] == stage]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_base(folder / "base", "flan")
    return train(folder)


def test_each_expert_writes_the_answers_of_its_domain_and_the_routers_find_it(trained: Path) -> None:
    losses, scores = losses_of(trained, 1), scores_of(trained)
    print(f"loss of stage one {losses[0]:.2f} to {losses[-1]:.3f}; of stage two", losses_of(trained, 2))
    assert losses[-1] < 0.02 * losses[0]
    for name, other in (("next", "upper"), ("upper", "next")):
        methods = ("base", f"expert:{name}", f"expert:{other}", "uniform", "mixture")
        exact = {method: scores[name, method, "exact_match"] for method in methods}
        loss = {method: round(scores[name, method, "loss"], 4) for method in methods}
        print(f"{name}: exact match {exact}, nats a token {loss}")
        assert exact["base"] == 0.0 and exact[f"expert:{name}"] == 1.0
        assert exact["mixture"] > 0.9 > exact[f"expert:{other}"]


@pytest.mark.parametrize(
    ("flags", "right"), [([], True), (["--expert", "upper"], False), (["--base"], False)]
)
def test_the_published_mixture_answers_on_the_command_line(
    trained: Path, flags: list[str], right: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "next c"
    arguments = ["generate", str(trained), "--prompt", prompt, "--max-new-tokens", "3", "--json"]
    assert main([*arguments, *flags]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert (text == ANSWERS["next"][prompt]) is right


def test_published_experts_are_imported_frozen_and_new_routers_find_them(trained: Path) -> None:
    experts = [{"name": name, "path": str(trained / "mixture" / "experts" / name)} for name in ANSWERS]
    run = train(
        trained.parents[1],
        run={"name": "imported"},
        mixer={"experts": experts},
        stage1={"enabled": False},
        stage2={"experts": "frozen"},
    )
    before, after = scores_of(trained), scores_of(run)
    losses = losses_of(run, 2)
    print(f"loss of stage two {losses[0]:.3f} to {losses[-1]:.4f}")
    assert losses[-1] < losses[0]
    for name in ANSWERS:
        exact = {m: after[name, m, "exact_match"] for m in ("base", f"expert:{name}", "mixture")}
        print(f"{name}: exact match {exact}")
        assert exact["base"] == 0.0 and exact[f"expert:{name}"] == 1.0 == exact["mixture"]
        assert before[name, f"expert:{name}", "exact_match"] == 1.0
