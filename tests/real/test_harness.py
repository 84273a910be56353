"""Tasks on a real small model and real benchmarks, where they are to be had: what lm-eval by itself says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.cli.main import main
from dsmixer.data.domains import Domain
from dsmixer.data.records import Example
from dsmixer.evaluation.code_run import PASSED
from dsmixer.evaluation.code_tasks import humaneval_verdicts, mbpp_verdicts
from dsmixer.evaluation.harness_data import DATA_VARIABLE, benchmark
from dsmixer.evaluation.harness_tasks import OWN_TASKS
from dsmixer.evaluation.methods import evaluate_mixture
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig

SHARED = Path(__file__).resolve().parents[3] / "shared"
BASE = SHARED / "models" / "english-7m"
LONG = os.environ.get("DSMIXER_LONG") == "1"
TASKS = {"arc_easy": 200, "sst2": 200, "piqa": 100, "medqa": 100} if LONG else {"arc_easy": 40, "sst2": 40}
NAMES = [f"dsmixer_{name}" for name in TASKS]
LIMIT = min(TASKS.values())

pytestmark = pytest.mark.skipif(
    not (SHARED / "data").is_dir() or not BASE.is_dir(),
    reason="the real benchmarks and models are not beside the checkout",
)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(SHARED / "data"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Experts on the real model that are not there yet: they change no figure of the base."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    mixture = attach_mixers(model, MixerConfig(["q", "v"], ["one", "two"], rank=4, alpha=8))
    with torch.no_grad():
        for _, parameter in mixture.expert_parameters():
            parameter.normal_(0.0, 0.1)
    folder = tmp_path_factory.mktemp("mixture")
    save_mixture(mixture, folder, tokenizer=AutoTokenizer.from_pretrained(BASE), base=str(BASE))
    return folder, mixture


@pytest.fixture(scope="module")
def ours(mixture: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``dsmixer evaluate --tasks`` gives for the mixture's base."""
    output = tmp_path_factory.mktemp("ours") / "scores.json"
    flags = ["--tasks", ",".join(NAMES), "--as", "base", "--limit", str(LIMIT), "--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATA_VARIABLE, str(SHARED / "data"))
        arguments = ["evaluate", str(mixture[0]), *flags, "--device", "cpu", "--output", str(output)]
        assert main(arguments) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_the_base_scores_what_lm_eval_does_by_itself(ours: dict[str, Any], tmp_path: Path) -> None:
    direct = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--log_samples"]
    direct += ["--model_args", f"pretrained={BASE},dtype=float32", "--tasks", ",".join(NAMES)]
    direct += ["--include_path", str(OWN_TASKS), "--limit", str(LIMIT), "--batch_size", "8"]
    subprocess.run(
        [*direct, "--output_path", str(tmp_path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    (results,) = (json.loads(path.read_text())["results"] for path in tmp_path.rglob("results_*.json"))
    rows = [row for row in ours["rows"] if row["method"] == "base"]
    assert len(rows) == 3 * len(NAMES)
    for row in rows:
        assert row["value"] == results[row["domain"]][f"{row['metric']},none"], row
        assert row["stderr"] == results[row["domain"]][f"{row['metric']}_stderr,none"], row
        assert row["num_examples"] == LIMIT
    for name in NAMES:
        (path,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
        theirs = sorted(map(json.loads, path.read_text().split("\n")[:-1]), key=lambda one: one["doc_id"])
        answered = ours["samples"]["base"][name]
        assert len(theirs) == len(answered) == LIMIT
        for one, other in zip(answered, theirs, strict=True):
            # its file holds numbers as texts: the same to the last bit
            assert [list(map(str, response)) for response in one["responses"]] == other["filtered_resps"]


@pytest.mark.parametrize("name", list(TASKS))
def test_lm_evals_acc_is_the_accuracy_of_our_own_scoring(
    name: str, ours: dict[str, Any], mixture: Any
) -> None:
    records = benchmark(name, data_folder=str(SHARED / "data"))["test"].select(range(LIMIT))
    examples = [
        Example(r["prompt"], r["completion"], name, tuple(r["choices"]), r["answer"], f"{name}:{i}")
        for i, r in enumerate(records)
    ]
    scored = evaluate_mixture(
        mixture[1].model,
        AutoTokenizer.from_pretrained(BASE),
        [Domain(name, "one", 1.0, examples, examples)],
        SimpleNamespace(max_examples=None, generate_max_new_tokens=4, exact_match=False, batch_size=8),
        max_length=2048,
        kinds=("base",),
    )
    found = {(row["method"], row["metric"]): row["value"] for row in scored["rows"]}
    theirs = {
        (row["method"], row["metric"]): row["value"]
        for row in ours["rows"]
        if row["domain"] == f"dsmixer_{name}"
    }
    assert found["base", "accuracy"] == theirs["base", "acc"]
    assert found["base", "accuracy_norm"] == theirs["base", "acc_bytes"]
    assert found["majority", "accuracy"] == theirs["majority", "acc"]


@pytest.mark.parametrize("name", ["stories260K", "llama2xs-279K", "english-7m"])
def test_a_programs_rest_is_decoded_as_it_is_behind_its_head_by_real_tokenizers(name: str) -> None:
    """The first two drop the first blank of what they decode; the third does not."""
    from dsmixer.evaluation.harness_model import LiveModel

    folder = SHARED / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    live, dropped = LiveModel(model, tokenizer, 1), 0
    for record in benchmark("humaneval", data_folder=str(SHARED / "data"))["test"].select(range(12)):
        head = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(record["prompt"] + record["completion"], add_special_tokens=False)["input_ids"]
        if whole[: len(head)] == head:
            rest = whole[len(head) :]
            behind = tokenizer.decode(whole).removeprefix(tokenizer.decode(head))
            assert live.continuation(rest) == behind and behind.startswith(" ")
            dropped += tokenizer.decode(rest) != behind
    assert (dropped > 0) == (name != "english-7m")


@pytest.mark.parametrize(("name", "verdicts"), [("humaneval", humaneval_verdicts), ("mbpp", mbpp_verdicts)])
def test_reference_solutions_pass_and_the_next_ones_solution_does_not(name: str, verdicts: Any) -> None:
    records = list(benchmark(name, data_folder=str(SHARED / "data"))["test"])
    records = records if LONG else records[:12]
    right = verdicts([[record["completion"]] for record in records], records)
    assert right == [[PASSED]] * len(records)
    others = [[record["completion"]] for record in (*records[1:], records[0])]
    wrong = verdicts(others[:6], records[:6])
    assert PASSED not in [verdict for (verdict,) in wrong]
