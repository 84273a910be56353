"""Generated programs by lm-eval: their first line keeps its blanks, and none runs without the limits here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from dsmixer.cli.main import main
from dsmixer.config.errors import UserError
from dsmixer.evaluation.harness_data import DATA_VARIABLE
from dsmixer.evaluation.harness_tasks import read_tasks

RECORD = {
    "prompt": "def two():\n",
    "completion": "    y = 2\n    return y",
    "entry_point": "two",
    "test": "def check(candidate):\n    assert candidate() == 2\n",
}
PIECES = ["▁def", "▁two():", "\n", "▁▁▁▁y", "▁=", "▁2", "\n▁▁▁▁return", "▁y"]
"""The record as a tokenizer made by SentencePiece may cut it; no piece is there twice."""


def as_sentencepiece(pieces: Sequence[str], decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """Blanks are part of pieces, and the first of a text is put there by the tokenizer itself."""
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *[(piece, -1.0) for piece in pieces]]
    vocabulary += [("▁", -9.0), (":", -9.0), ("▁:", -9.0)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    parts = [normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")]
    backend.normalizer = normalizers.Sequence(parts)
    backend.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


DECODERS = {
    "llama-2": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "metaspace": decoders.Metaspace("▁", "first"),
}


def write_reciter(folder: Path, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """A model that goes on in a text by heart, if no token of it is there twice, and ends behind it."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids)
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in (model.lm_head.weight, *model.model.layers[0].parameters()):
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(*model.model.embed_tokens.weight.shape))
        model.lm_head.weight[ids[1:], ids[:-1]] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(autouse=True)
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "humaneval").mkdir(parents=True)
    (tmp_path / "data" / "humaneval" / "test.jsonl").write_text(json.dumps(RECORD))
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))


@pytest.mark.parametrize("name", DECODERS)
def test_a_program_written_without_a_fault_passes_though_the_tokenizer_drops_the_first_blanks(
    name: str, tmp_path: Path
) -> None:
    """The body's lines have to stand in one column."""
    tokenizer = as_sentencepiece(PIECES, DECODERS[name])
    whole = RECORD["prompt"] + RECORD["completion"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(whole)["input_ids"]) == PIECES
    rest = tokenizer(whole)["input_ids"][3:]
    assert tokenizer.decode(rest) != RECORD["completion"], "what lm-eval would be given"
    write_reciter(tmp_path / "base", tokenizer, whole)
    output = tmp_path / "scores.json"
    flags = ["--tasks", "dsmixer_humaneval", "--run-generated-code", "--device", "cpu"]
    assert main(["evaluate", str(tmp_path / "base"), *flags, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["samples"]["base"]["dsmixer_humaneval"][0]["responses"] == [["passed"]]
    assert [row["value"] for row in result["rows"]] == [1.0]


MODULE = """
from dsmixer.evaluation.code_tasks import Programs

verdicts = Programs(lambda record, answer: record["prompt"] + answer + "\\nassert two() == 2")

def run_it(record, results):
    exec(record["prompt"] + results[0])
    return {"pass@1": 1.0}

def its_own(answers, records):
    return answers
"""
TASK = """
task: mine
custom_dataset: !function dsmixer.evaluation.harness_data.benchmark
dataset_kwargs: {benchmark: humaneval, fields: [test, entry_point]}
unsafe_code: true
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_target: completion
metric_list: [{metric: pass@1, aggregation: mean, higher_is_better: true}]
"""
BY = "{name: %s, filter: [{function: take_first}, {function: custom, filter_fn: !function mine_code.%s}]}"
JUDGED = "process_results: !function dsmixer.evaluation.code_tasks.pass_at_1\n"
OWN_WAYS = {
    "in its figures": "process_results: !function mine_code.run_it\n",
    "in a filter of its own": f"filter_list: [{BY % ('a', 'its_own')}]\n{JUDGED}",
    "in one of two filters": f"filter_list: [{BY % ('a', 'verdicts')}, {BY % ('b', 'its_own')}]\n{JUDGED}",
}


def write_task(folder: Path, more: str) -> Path:
    (folder / "mine_code.py").write_text(MODULE)
    (folder / "mine.yaml").write_text(TASK + more)
    return folder


@pytest.mark.parametrize("way", OWN_WAYS)
def test_a_task_of_the_users_that_runs_programs_in_its_own_way_is_refused(way: str, tmp_path: Path) -> None:
    folder = write_task(tmp_path, OWN_WAYS[way])
    with pytest.raises(UserError, match="mine runs generated programs in its own way.*(?s:.*)Programs"):
        read_tasks(["mine"], where="--tasks", include_path=folder, run_generated_code=True)


def test_one_that_hands_them_to_the_runner_here_is_scored(tmp_path: Path) -> None:
    folder = write_task(tmp_path, f"filter_list: [{BY % ('a', 'verdicts')}]\n{JUDGED}")
    with pytest.raises(UserError, match="add --run-generated-code"):
        read_tasks(["mine"], where="--tasks", include_path=folder)
    read = read_tasks(["mine"], where="--tasks", include_path=folder, run_generated_code=True)
    assert read.programs == {"mine"} and read.run_code
    (task,) = read.built
    task.build_all_requests()
    for answer, share in (("    return 2", 1.0), ("    return 3", 0.0), ("    while True: fork()", 0.0)):
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [answer], {}
        task.apply_filters()
        (record,) = task.eval_docs
        found = task.process_results(record, [task.instances[0].filtered_resps["a"]])
        assert found == {"pass@1": share}, answer
