"""The two commands on a saved mixture: what they print, and what they refuse."""

from __future__ import annotations

import io
import json

import pytest
import torch

from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.cli.main import main
from dsmixer.model.inject import route_to


@pytest.fixture
def folder(mixture, tokenizer, tmp_path):
    """A run folder with a base model beside it."""
    mixture_free = {
        k: v for k, v in mixture.model.state_dict().items() if ".bank." not in k and ".router." not in k
    }
    base = type(mixture.model)(mixture.model.config)
    base.load_state_dict({key.replace(".base.", "."): value for key, value in mixture_free.items()})
    base.save_pretrained(tmp_path / "base")
    save_mixture(mixture, tmp_path / "run" / "mixture", tokenizer=tokenizer, base=str(tmp_path / "base"))
    return tmp_path / "run"


@pytest.fixture
def data(tmp_path):
    records = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    choices = [" fine", " dull"]
    records = [{"prompt": f"film {i}:", "choices": choices, "answer": i % 2} for i in range(4)]
    (tmp_path / "taste.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def greedy(model, tokenizer, prompt, num):
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(num):
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            if int(best) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, best], dim=1)
    return tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("flags", "expert"), [([], "routers"), (["--expert", "taste"], "taste"), (["--base"], None)]
)
def test_generate_writes_what_the_mixture_in_memory_writes(flags, expert, folder, mixture, tokenizer, capsys):
    arguments = ["generate", str(folder), "--prompt", "4 + 4", "--max-new-tokens", "9", *flags]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    if expert == "routers":
        wanted = greedy(mixture.model, tokenizer, "4 + 4", 9)
    else:
        with route_to(mixture.model, expert):
            wanted = greedy(mixture.model, tokenizer, "4 + 4", 9)
    assert wanted and answer["text"] == wanted and answer["prompt"] == "4 + 4"
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == wanted.strip()


def test_generate_reads_the_prompt_from_standard_input_and_draws_by_seed(folder, monkeypatch, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr("sys.stdin", io.StringIO("4 + 4\n"))
        main(
            [
                "generate",
                str(folder),
                "--temperature",
                "1.5",
                "--seed",
                seed,
                "--max-new-tokens",
                "20",
                "--json",
            ]
        )
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["prompt"] == "4 + 4" and texts[0] == texts[1] != texts[2]


def test_evaluate_prints_tables_and_json_and_writes_the_file(folder, data, capsys):
    sources = [f"--data=sums={data / 'sums.jsonl'}", f"--data=taste={data / 'taste.jsonl'}"]
    output = data / "out" / "scores.json"
    assert main(["evaluate", str(folder), *sources, "--json", "--output", str(output)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(output.read_text())
    assert {row["domain"] for row in result["rows"]} == {"sums", "taste"}
    metrics = {(row["domain"], row["metric"]): row["num_examples"] for row in result["rows"]}
    assert metrics["sums", "exact_match"] == 5 and metrics["taste", "accuracy_norm"] == 4
    assert (
        main(["evaluate", str(folder / "mixture"), *sources, "--no-exact-match", "--max-examples", "3"]) == 0
    )
    printed = capsys.readouterr().out
    assert "held-out loss" in printed and "mixture" in printed and "exact match" not in printed


def test_evaluate_takes_the_data_of_the_run(folder, data, capsys):
    recipe = {
        "base": {"model": str(data / "base"), "dtype": "float32"},
        "data": {
            "max_length": 48,
            "domains": [
                {
                    "name": "plus",
                    "expert": "sums",
                    "train": str(data / "sums.jsonl"),
                    "test": str(data / "sums.jsonl"),
                },
            ],
        },
        "mixer": {"experts": [{"name": name} for name in ("sums", "taste", "spare")]},
        "evaluation": {"max_examples": 2, "exact_match": False},
    }
    (folder / "config.yaml").write_text(json.dumps(recipe))
    assert main(["evaluate", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["own_experts"] == {"plus": "sums"} and "plus" in result["recovered"]
    assert {row["num_examples"] for row in result["rows"]} == {2}
    assert "exact_match" not in {row["metric"] for row in result["rows"]}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["evaluate", "{run}"], "to say what to score it on"),
        (["evaluate", "{run}", "--data", "sums"], "write NAME=PATH"),
        (["evaluate", "{run}", "--data", "../sums={data}/sums.jsonl"], "'../sums="),
        (
            ["evaluate", "{run}", "--data", "a={data}/sums.jsonl", "--data", "a={data}/taste.jsonl"],
            "named twice",
        ),
        (["evaluate", "{run}", "--data", "a={data}/absent.jsonl"], "absent.jsonl"),
        (["evaluate", "{data}", "--data", "a={data}/sums.jsonl"], "neither a mixture nor a run folder"),
        (["evaluate", "{data}/nowhere"], "no such folder"),
        (["generate", "{data}/nowhere", "--prompt", "x"], "no such folder"),
        (["generate", "{run}", "--prompt", "x", "--expert", "physics"], "choose from sums, taste, spare"),
        (["generate", "{run}", "--prompt", ""], "the prompt is empty"),
        (["generate", "{run}", "--prompt", "x", "--chat"], "no chat template"),
        (["generate", "{run}", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "{run}", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "{run}", "--prompt", "x", "--device", "warp:9"], "--device"),
        (["generate", "{run}", "--prompt", "x", "--base-model", "{data}/nowhere"], "can't be loaded"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_two(arguments, reason, folder, data, capsys):
    filled = [argument.format(run=folder, data=data) for argument in arguments]
    assert main(filled) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and reason in printed.err and "Fix: " in printed.err


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and "--json" in capsys.readouterr().out
