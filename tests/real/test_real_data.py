"""The data room on real benchmarks and real tokenizers, where they are to be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dsmixer.config.schema import DataConfig
from dsmixer.data.domains import Domain, load_domains
from dsmixer.data.encode import encode_pairs
from dsmixer.data.sampler import StepSampler
from dsmixer.data.tokenize import tokenize_examples

SHARED = Path(__file__).resolve().parents[3] / "shared"
TOKENIZERS = ["english-7m", "stories260K"]
BENCHMARKS = ["gsm8k", "sst2", "arc_easy", "mbpp", "cola"]

pytestmark = pytest.mark.skipif(
    not (SHARED / "data").is_dir() or not (SHARED / "models").is_dir(),
    reason="the real benchmarks and models are not beside the checkout",
)


@pytest.fixture(scope="module")
def domains() -> list[Domain]:
    folders = [(name, str(SHARED / "data" / name)) for name in BENCHMARKS]
    entries = [{"name": name, "train": folder, "test": folder, "max_train": 200} for name, folder in folders]
    return load_domains(DataConfig(domains=entries), seed=0, quarantine=None)


def test_every_real_record_is_read_whole() -> None:
    for folder in sorted((SHARED / "data").iterdir()):
        if folder.is_dir():
            part = "train" if (folder / "train.jsonl").is_file() else "test"
            entry = {"name": folder.name, "train": str(folder / f"{part}.jsonl")}
            (domain,) = load_domains(DataConfig(domains=[entry]), seed=0, quarantine=None)
            with (folder / f"{part}.jsonl").open(encoding="utf-8") as file:
                assert len(domain.train) == sum(1 for _ in file)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_completion_ids_decode_to_the_text_of_the_record(name: str, domains: list[Domain]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(SHARED / "models" / name)
    for domain in domains:
        for example in domain.train[:50]:
            ((prompt, completion),) = encode_pairs(tokenizer, [example.prompt], [example.completion])
            assert prompt == tokenizer(example.prompt)["input_ids"]
            text = tokenizer.decode(prompt + completion, skip_special_tokens=True)
            whole = tokenizer(example.prompt + example.completion)["input_ids"]
            assert text == tokenizer.decode(whole, skip_special_tokens=True)


def test_real_domains_become_steps_with_little_padding(domains: list[Domain]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(SHARED / "models" / "english-7m")
    examples = [example for domain in domains for example in domain.train]
    ids = [d for d, domain in enumerate(domains) for _ in domain.train]
    store = tokenize_examples(examples, ids, tokenizer, max_length=512)
    sampler = StepSampler(
        store,
        weights=[1.0] * len(domains),
        max_length=512,
        packing=True,
        global_batch_size=8,
        epochs=1,
        max_steps=None,
        seed=0,
    )
    rows = [row for step in range(sampler.num_steps) for row in sampler.rows(step) if row]
    assert sorted(i for row in rows for i in row) == list(range(len(store)))
    assert store.lengths.sum() / (512 * len(rows)) > 0.9 and (store.target_counts >= 1).all()
