"""Tasks at the end of a run on two ranks under ZeRO-3, where all have to enter every module together."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.launching import REPOSITORY, launch
from support.tiny import write_recipe

from dsmixer.cli.main import main
from dsmixer.evaluation.harness_data import DATA_VARIABLE

LONG = os.environ.get("DSMIXER_LONG") == "1"
TASKS = ["dsmixer_arc_easy", *(["dsmixer_gsm8k"] if LONG else [])]
"""The long form writes answers as well: 256 tokens, each of them through all gathers of ZeRO-3."""
TRAIN = REPOSITORY / "launch" / "train.py"
CHOICES = [" 4", " a dog sleeps", " tac"]


def write_lines(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_run_ends_with_the_scores_that_its_mixture_gets_afterwards(tmp_path, monkeypatch) -> None:
    answers = [(i * 2) % 3 for i in range(5)]
    choices = [
        {"prompt": f"{i}:", "completion": CHOICES[a], "choices": CHOICES, "answer": a}
        for i, a in enumerate(answers)
    ]
    write_lines(tmp_path / "benchmarks" / "arc_easy" / "test.jsonl", choices)
    written = [{"prompt": "2+2=", "completion": "#### 4"}]
    write_lines(tmp_path / "benchmarks" / "gsm8k" / "test.jsonl", written)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "benchmarks"))
    recipe = write_recipe(tmp_path)
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 320}))
    test = write_lines(tmp_path / "test.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    changes = ["run.name=tasks", "deepspeed.zero_stage=3", "stage1.max_steps=1", "stage2.max_steps=1"]
    changes += ["evaluation.enabled=true", f"evaluation.tasks=[{', '.join(TASKS)}]"]
    changes += [f"data.domains.0.test={test}", "evaluation.exact_match=false"]
    launch(TRAIN, ["--config", str(recipe), *changes], ranks=2).check()
    run = tmp_path / "runs" / "tasks"
    found = json.loads((run / "evaluation.json").read_text())
    output = tmp_path / "afterwards.json"
    flags = ["--tasks", ",".join(TASKS), "--as", "base", "--as", "mixture", "--device", "cpu"]
    assert main(["evaluate", str(run), *flags, "--output", str(output)]) == 0
    afterwards = json.loads(output.read_text())["rows"]
    own = [row for row in found["rows"] if row["domain"] in TASKS]
    # the majority; for base and mixture three figures of choices and one of numbers
    assert len(own) == 1 + 2 * (3 + LONG)
    assert own == [{**row, "value": pytest.approx(row["value"])} for row in afterwards]
    assert found["tasks"]["dsmixer_arc_easy"]["scored"] == 5
