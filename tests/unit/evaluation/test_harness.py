"""Tasks by lm-evaluation-harness, on a tiny real model: its own command line is the oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.cli.main import main
from dsmixer.config.errors import UserError
from dsmixer.data.domains import Domain
from dsmixer.data.records import Example
from dsmixer.evaluation.harness_data import DATA_VARIABLE, benchmark, final_number
from dsmixer.evaluation.harness_tasks import OWN_TASKS, read_tasks
from dsmixer.evaluation.methods import evaluate_mixture
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig

CHOICES = [" red", " a deep blue", " grün", " so"]
LIMIT = 9


def lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def choice_records(number: int) -> list[dict]:
    """Choices of unlike lengths, a letter of two bytes and one that is a line's end to Python among them."""
    answers = [(7 * i) % 4 for i in range(number)]
    return [
        {
            "prompt": f"Question {i}: which colour has the number {i * i}?\u2028\nAnswer:",
            "completion": CHOICES[answer],
            "choices": CHOICES[: 2 + i % 3] if answer < 2 + i % 3 else CHOICES,
            "answer": answer,
        }
        for i, answer in enumerate(answers)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    lines(folder / "arc_easy" / "test.jsonl", choice_records(12))
    lines(folder / "arc_easy" / "train.jsonl", choice_records(16)[12:])
    lines(folder / "cola" / "test.jsonl", choice_records(12))
    sums = [{"prompt": f"{i} + 5 =", "completion": f" so\n#### {i + 5}"} for i in range(4)]
    lines(folder / "gsm8k" / "test.jsonl", sums)
    lines(folder / "gsm8k" / "train.jsonl", sums)
    program = {"prompt": "def two():\n", "completion": "    return 2\n", "entry_point": "two"}
    test = "def check(candidate):\n    assert candidate() == 2\n"
    lines(folder / "humaneval" / "test.jsonl", [{**program, "test": test}])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``base``, a model, and ``mixture``, experts and routers on it that stand out."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    options = MixerConfig(["q", "v", "o"], ["sums", "taste"], rank=4, alpha=8, router_std=1.0)
    mixture = attach_mixers(model, options)
    with torch.no_grad():
        for _, parameter in mixture.expert_parameters():
            parameter.normal_(0.0, 0.4)
    save_mixture(mixture, folder / "mixture", tokenizer=byte_tokenizer(), base=str(folder / "base"))
    return folder


@pytest.fixture(autouse=True)
def told(data, monkeypatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(data))


def scored(folder: Path, tmp_path: Path, *flags: str) -> dict:
    """What ``dsmixer evaluate --tasks`` writes."""
    output = tmp_path / "scores.json"
    assert main(["evaluate", str(folder), "--device", "cpu", "--output", str(output), *flags]) == 0
    return json.loads(output.read_text())


def figures(result: dict, method: str) -> dict[tuple[str, str], float]:
    return {(r["domain"], r["metric"]): r["value"] for r in result["rows"] if r["method"] == method}


def test_the_base_scores_what_lm_evals_own_command_line_says(folder, data, tmp_path) -> None:
    tasks = ["dsmixer_arc_easy", "dsmixer_gsm8k"]
    flags = ["--tasks", ",".join(tasks), "--num-fewshot", "2", "--limit", str(LIMIT), "--batch-size", "4"]
    inside = scored(folder / "mixture", tmp_path, *flags, "--as", "base")
    alone = scored(folder / "base", tmp_path, *flags)
    direct = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--log_samples"]
    direct += ["--model_args", f"pretrained={folder / 'base'},dtype=float32", "--tasks", ",".join(tasks)]
    direct += ["--include_path", str(OWN_TASKS), "--num_fewshot", "2", "--limit", str(LIMIT)]
    direct += ["--batch_size", "4", "--output_path", str(tmp_path / "direct")]
    subprocess.run(direct, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True, capture_output=True)
    (results,) = (json.loads(path.read_text()) for path in (tmp_path / "direct").rglob("results_*.json"))
    assert figures(inside, "base") == figures(alone, "base")
    for (task, metric), value in figures(inside, "base").items():
        assert value == results["results"][task][f"{metric},none"], (task, metric)
    for task in tasks:
        (path,) = (tmp_path / "direct").rglob(f"samples_{task}_*.jsonl")
        theirs = sorted(map(json.loads, path.read_text().split("\n")[:-1]), key=lambda one: one["doc_id"])
        assert len(theirs) == min(LIMIT, 4 if task == "dsmixer_gsm8k" else 12)
        # its file holds numbers as texts; equal to the last bit
        ours = [
            [str(r) if isinstance(r, str) else list(map(str, r)) for r in one["responses"]]
            for one in inside["samples"]["base"][task]
        ]
        assert ours == [one["filtered_resps"] for one in theirs]
        assert inside["tasks"][task]["num_fewshot"] == 2


def test_each_method_has_the_accuracy_of_dsmixers_own_scoring(folder, tmp_path) -> None:
    from dsmixer import load_mixture

    methods = ["mixture", "uniform", "expert:taste"]
    flags = [flag for method in methods for flag in ("--as", method)]
    result = scored(folder / "mixture", tmp_path, "--tasks", "dsmixer_cola", *flags)
    examples = [
        Example(r["prompt"], r["completion"], "cola", tuple(r["choices"]), r["answer"], f"cola:{i}")
        for i, r in enumerate(choice_records(12))
    ]
    model, tokenizer = load_mixture(folder / "mixture")
    settings = SimpleNamespace(max_examples=None, generate_max_new_tokens=4, exact_match=False, batch_size=4)
    domains = [Domain("dsmixer_cola", "taste", 1.0, examples, examples)]
    ours = evaluate_mixture(model, tokenizer, domains, settings, max_length=1024)
    names = {"accuracy": "acc", "accuracy_norm": "acc_bytes"}
    for row in ours["rows"]:
        if row["metric"] in names and row["method"] in (*methods, "majority"):
            key = row["domain"], names[row["metric"]]
            assert figures(result, row["method"])[key] == pytest.approx(row["value"]), row
    assert [r["method"] for r in result["rows"] if r["metric"] == "mcc"] == methods
    answers = {json.dumps(result["samples"][method]["dsmixer_cola"]) for method in methods}
    assert len(answers) == len(methods), "every method answers otherwise"
    assert all(row["stderr"] is not None for row in result["rows"] if row["metric"] in ("mcc", "acc_norm"))


def test_generated_programs_run_when_asked_for_alone_and_are_judged_by_their_tests(
    folder, tmp_path, capsys
) -> None:
    assert main(["evaluate", str(folder / "base"), "--tasks", "dsmixer_humaneval"]) == 2
    assert "add --run-generated-code" in capsys.readouterr().err
    flags = ["--tasks", "dsmixer_humaneval", "--run-generated-code"]
    result = scored(folder / "base", tmp_path, *flags)
    assert figures(result, "base") == {("dsmixer_humaneval", "pass@1"): 0.0}
    (sample,) = result["samples"]["base"]["dsmixer_humaneval"]
    (verdicts,) = sample["responses"]
    assert verdicts[0].startswith(("SyntaxError", "IndentationError", "ValueError"))
    assert result["generated_code"]["memory"] == 1 << 30


def test_code_tasks_tell_right_programs_from_wrong_ones() -> None:
    from dsmixer.evaluation.code_tasks import humaneval_verdicts, mbpp_verdicts, pass_at_1

    record = {"prompt": "def two():\n", "test": "def check(f):\n    assert f() == 2", "entry_point": "two"}
    (verdicts,) = humaneval_verdicts([["    return 2\n", "    return 3\n", "    exit()\n"]], [record])
    assert verdicts == ["passed", "AssertionError: ", "SystemExit: None"]
    assert pass_at_1(record, [verdicts]) == {"pass@1": 1 / 3}
    record = {"test_setup_code": "import math", "test_list": ["assert f(4) == 2", "assert f(9) == 3"]}
    answers = ["def f(x):\n    return math.sqrt(x)", "def f(x):\n    return 2"]
    assert mbpp_verdicts([answers[:1], answers[1:]], [record, record]) == [["passed"], ["AssertionError: "]]


REFUSED = {
    "unknown": (["--tasks", "dsmixer_arc_esy"], "write dsmixer_arc_easy"),
    "no folder": (["--tasks", "dsmixer_cola", "--include-path", "/nowhere"], "--include-path /nowhere"),
    "no records": (["--tasks", "dsmixer_sst2"], "sst2/test.jsonl"),
    "too few": (["--tasks", "dsmixer_arc_easy", "--num-fewshot", "5"], "4 solved examples"),
    "none at all": (["--tasks", "dsmixer_cola", "--num-fewshot", "1"], "0 solved examples"),
    "a method": (["--tasks", "dsmixer_cola", "--as", "arrow"], "write mixture, base, uniform or expert:NAME"),
    "an expert": (["--tasks", "dsmixer_cola", "--as", "expert:tast"], "write expert:taste"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_run_is_refused_with_a_way_out(name, folder, capsys) -> None:
    flags, told = REFUSED[name]
    assert main(["evaluate", str(folder / "mixture"), *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_plain_model_answers_as_itself_only(folder, capsys) -> None:
    arguments = ["evaluate", str(folder / "base"), "--tasks", "dsmixer_cola", "--as", "mixture"]
    assert main(arguments) == 2 and "this is a plain model" in capsys.readouterr().err


def test_a_missing_lm_eval_and_a_missing_folder_are_told(monkeypatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE)
    with pytest.raises(UserError, match=rf"environment: {DATA_VARIABLE}.*(?s:.*)arc_easy/test.jsonl"):
        read_tasks(["dsmixer_arc_easy"], where="--tasks")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"-c constraints\.txt --no-build-isolation -e '\.\[eval\]'"):
        read_tasks(["dsmixer_arc_easy"], where="--tasks")


def test_lm_evals_own_way_to_run_code_is_refused() -> None:
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "humaneval"
    with pytest.raises(UserError, match="humaneval_instruct.*none of the limits"):
        read_tasks(["humaneval_instruct"], where="--tasks", include_path=folder, run_generated_code=True)


def test_tasks_of_a_folder_of_the_users_and_their_tag(folder, tmp_path) -> None:
    include = f"include: {OWN_TASKS / '_choice.yaml'}\ntag: mine\n"
    for name in ("one", "two"):
        text = f"{include}task: {name}\ndataset_kwargs: {{benchmark: cola, fields: [choices, answer]}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    flags = ["--tasks", "mine", "--include-path", str(tmp_path), "--limit", "2"]
    result = scored(folder / "base", tmp_path, *flags)
    assert list(result["tasks"]) == ["one", "two"]
    assert {row["num_examples"] for row in result["rows"]} == {2}


def test_every_task_file_reads_its_folder(data, tmp_path, monkeypatch) -> None:
    """All in one folder of records that have every key."""
    record = {"prompt": "p", "completion": " c", "choices": [" c", " d"], "answer": 0, "test": "t"}
    record |= {"entry_point": "f", "test_setup_code": "", "test_list": ["assert True"]}
    names = sorted(path.stem for path in OWN_TASKS.glob("[a-z]*.yaml"))
    for name in names:
        lines(tmp_path / name / "test.jsonl", [record] * 2)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    read = read_tasks(["dsmixer_*"], where="--tasks", run_generated_code=True)
    tasks = {task.task_name: task for task in read.built}
    assert sorted(tasks) == [f"dsmixer_{name}" for name in names] and len(names) == 12 and read.run_code
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=1)
        texts = {instance.args[0] for instance in task.instances}
        assert texts == {"p"}, "the prompt and nothing else"
        if task.OUTPUT_TYPE == "multiple_choice":
            assert [instance.args[1] for instance in task.instances] == [" c", " d"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"prompt": "p", "completion": "c", "answer": 0}', "no choices"),
        ('{"prompt": "p", "completion": "c", "choices": "c", "answer": 0}', "choices: expected a list"),
        ('{"prompt": "p", "completion": "c", "choices": [], "answer": 0}', "choices: the list is empty"),
        ('{"prompt": "p", "completion": "c", "choices": ["c"], "answer": 0}', "expected two or more texts"),
        ('{"prompt": "p", "completion": "c", "choices": ["c", ""], "answer": 0}', "none of them empty"),
        ('{"prompt": "p", "completion": "c", "choices": ["c", "d"], "answer": 2}', "2 is none of 2 choices"),
        ('{"prompt": "p", "completion": "c", "choices": ["d", "c"], "answer": true}', "True is none of 2"),
        ('{"prompt": "p", "completion": "c", "choices": ["c", "d"], "answer": "e"}', "'e' is none of 2"),
        ('{"prompt": "p", "completion": "c", "choices": ["c", "d"], "answer": [0]}', "is none of 2 choices"),
        (
            '{"prompt": "p", "completion": "c", "choices": ["c", "d"], "answer": 1}',
            "the completion is 'c', but",
        ),
        (
            '{"prompt": "p", "completion": "c", "choices": ["c", 7], "answer": 0}',
            r"choices\[1\]: expected text",
        ),
        ('{"prompt": 7, "completion": "c", "choices": ["c", "d"], "answer": 0}', "prompt: expected text"),
    ],
)
def test_bad_records_are_told_by_line(line, told, tmp_path) -> None:
    good = '{"prompt": "p", "completion": "c", "choices": ["c", "d"], "answer": 0}\n'
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "test.jsonl").write_text(good + line + "\n")
    with pytest.raises(UserError, match=rf"test\.jsonl:2: .*{told}"):
        benchmark("cola", fields=("choices", "answer"), data_folder=str(tmp_path))


def test_an_answer_that_is_a_letter_or_a_text_is_its_choices_place(tmp_path) -> None:
    record = {"prompt": "p", "completion": "d", "choices": ["c", "d"]}
    lines(tmp_path / "cola" / "test.jsonl", [{**record, "answer": answer} for answer in (1, 1.0, "B", "d")])
    read = benchmark("cola", fields=("choices", "answer"), data_folder=str(tmp_path))["test"]
    assert read["answer"] == [1, 1, 1, 1] and [type(one) for one in read["answer"]] == [int] * 4


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"test_list": "assert two() == 2", "test_setup_code": ""}, "test_list: expected a list"),
        ({"test_list": ["assert True", 1], "test_setup_code": ""}, r"test_list\[1\]: expected text"),
        ({"test_list": ["assert True"], "test_setup_code": []}, "test_setup_code: expected text"),
    ],
)
def test_tests_of_a_program_that_are_none_are_told_and_not_scored_as_failed(record, told, tmp_path) -> None:
    lines(tmp_path / "mbpp" / "test.jsonl", [{"prompt": "p", "completion": "c", **record}])
    with pytest.raises(UserError, match=rf"test\.jsonl:1: {told}"):
        benchmark("mbpp", fields=("test_setup_code", "test_list"), data_folder=str(tmp_path))


def test_a_file_in_another_encoding_is_told_by_line(tmp_path) -> None:
    (tmp_path / "gsm8k").mkdir()
    record = '{"prompt": "p", "completion": "c"}\n{"prompt": "gr\u00fcn", "completion": "c"}'
    (tmp_path / "gsm8k" / "test.jsonl").write_bytes(record.encode("latin-1"))
    with pytest.raises(UserError, match=r"test\.jsonl:2: not UTF-8"):
        benchmark("gsm8k", data_folder=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 3 = 18, so\n#### 18\nQuestion 2", "18"),
        ("that makes $1,234.50.", "1234.50"),
        ("#### 18.0", "18"),
        ("from 3 to -7", "-7"),
        ("#### none, but 5", "5"),
        ("no idea", None),
    ],
)
def test_the_final_number_of_an_answer(text, number) -> None:
    found = final_number(text)
    assert found == (None if number is None else type(found)(number))
