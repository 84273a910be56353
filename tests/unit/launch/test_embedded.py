"""The embedded domains and base: made again alike, right by another way of working them out, and loadable."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDED = Path(__file__).resolve().parents[3] / "launch" / "embedded"
DOMAINS = ("totals", "reversal", "brackets", "codebook", "dates", "reviews")
PARTS = list(itertools.product(DOMAINS, ("train", "test")))

Row = dict[str, object]


@pytest.fixture
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules of the folder, imported as ``make.py`` imports them and forgotten afterwards."""
    names = ("domains", "general", "pretrain")
    sys.path.insert(0, str(EMBEDDED))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(EMBEDDED))
        for name in names:
            sys.modules.pop(name, None)


def read_rows(domain: str, part: str) -> list[Row]:
    lines = (EMBEDDED / "domains" / domain / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def totals_answer(prompt: str) -> str:
    operands = [int(term) for term in prompt.removesuffix(" =").split("+")]
    return " " + " ".join(map(str, list(itertools.accumulate(operands))[1:]))


def reversal_answer(prompt: str) -> str:
    return ' "' + "".join(reversed(prompt.split('"')[1])) + '"'


def brackets_answer(prompt: str) -> str:
    """Deletes matched pairs until none is left; what is still open asks for its closer, last one first."""
    text = prompt.removesuffix("|")
    pairs = ("()", "[]", "{}", "<>")
    while any(pair in text for pair in pairs):
        for pair in pairs:
            text = text.replace(pair, "")
    return text[::-1].translate(str.maketrans("([{<", ")]}>"))


def codebook_answer(prompt: str) -> str:
    """Looks letters up in the book that the train rows spell out, whatever book the script holds."""
    book: dict[str, str] = {}
    for row in read_rows("codebook", "train"):
        plain, coded = str(row["prompt"]).removesuffix(" /"), str(row["completion"])[1:]
        for letter, code in zip(plain, coded, strict=True):
            assert book.setdefault(letter, code) == code
    assert sorted(book) == sorted(book.values()) and len(book) == 27
    return " " + "".join(book[letter] for letter in prompt.removesuffix(" /"))


def dates_answer(prompt: str) -> str:
    date = datetime.date.fromisoformat(prompt.removesuffix(" is"))
    return f" {date.day} {date.strftime('%b')}, Q{[1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4][date.month - 1]}"


def reviews_answer(prompt: str) -> str:
    kindly = set(re.findall(r"\w+", "kind fresh clean warm super tasty calm neat fine nice soft sweet"))
    clauses = [clause.split() for clause in prompt.removesuffix(".").split(",")]
    good = [(clause[-1] in kindly) ^ ("not" in clause) for clause in clauses]
    verdicts = {clause[0]: "ok" if well else "no" for clause, well in zip(clauses, good, strict=True)}
    return " " + ", ".join(f"{thing} {verdict}" for thing, verdict in reversed(verdicts.items()))


ANSWERS = {
    "totals": totals_answer,
    "reversal": reversal_answer,
    "brackets": brackets_answer,
    "codebook": codebook_answer,
    "dates": dates_answer,
    "reviews": reviews_answer,
}


def test_the_command_makes_the_shipped_domains_again_byte_for_byte(tmp_path: Path) -> None:
    command = [sys.executable, str(EMBEDDED / "make.py"), "domains", "--out", str(tmp_path)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "1"})
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    shipped = EMBEDDED / "domains"
    assert made == {path.relative_to(shipped): path.read_bytes() for path in shipped.rglob("*.jsonl")}
    assert sorted(made) == sorted(Path(domain) / f"{part}.jsonl" for domain, part in PARTS)


@pytest.mark.parametrize(("domain", "part"), PARTS)
def test_completions_are_right_by_another_way_of_working_them_out(domain: str, part: str) -> None:
    rows = read_rows(domain, part)
    picked = rows if domain != "codebook" else rows[:40]
    assert [row["completion"] for row in picked] == [ANSWERS[domain](str(row["prompt"])) for row in picked]


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_prompt_comes_twice_and_every_row_is_short_and_names_its_domain(domain: str) -> None:
    train, test = read_rows(domain, "train"), read_rows(domain, "test")
    prompts = [row["prompt"] for row in train + test]
    assert (len(train), len(test), len(set(prompts))) == (1600, 120, 1720)
    assert max(len(f"{row['prompt']}{row['completion']}") for row in train + test) <= 94
    assert {row["domain"] for row in train + test} == {domain}


def test_reviews_offer_every_pair_of_verdicts_and_the_answer_is_the_completion() -> None:
    rows = read_rows("reviews", "train")
    counts = [sum(row["answer"] == answer for row in rows) for answer in range(4)]
    assert min(counts) > 320
    assert all(row["choices"][row["answer"]] == row["completion"] for row in rows)  # type: ignore[call-overload,index]


def test_the_pretraining_text_has_the_formats_but_not_the_rules(scripts: dict[str, ModuleType]) -> None:
    general = scripts["general"]
    sources = dict(zip(DOMAINS, general.SOURCES, strict=False))
    for domain, source in sources.items():
        rng = random.Random(0)
        texts = [source(rng) for _ in range(400)]
        asked = [(prompt, completion) for prompt, completion in texts if not prompt.endswith(",")]
        right = sum(completion == ANSWERS[domain](prompt) for prompt, completion in asked[:100])
        assert right <= 5, domain


def test_pretraining_is_deterministic_and_lowers_the_loss(scripts: dict[str, ModuleType]) -> None:
    pretrain = scripts["pretrain"]
    settings = pretrain.Pretraining(steps=6, batch_size=8, pool=2, warmup=1)
    threads = torch.get_num_threads()
    try:
        first, second = pretrain.pretrain(settings), pretrain.pretrain(settings)
    finally:
        torch.set_num_threads(threads)
    for (name, left), right in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    batch = next(pretrain.batches(settings))
    untrained = pretrain.weighted_loss(pretrain.make_model(settings.seed), batch)
    assert pretrain.weighted_loss(first, batch) < untrained - 0.5


def test_the_shipped_tokenizer_is_the_scripts_own(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    scripts["pretrain"].make_tokenizer().save_pretrained(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert made == json.loads((EMBEDDED / "base" / "tokenizer.json").read_text(encoding="utf-8"))


def test_the_tokenizer_gives_one_id_a_byte_and_puts_bos_first() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base")
    text = "".join(map(chr, range(32, 127))) + " é ж 漢\n\t"
    ids = tokenizer(text)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *(3 + byte for byte in text.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 259


def test_the_base_loads_and_has_the_size_its_shapes_give() -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "base", dtype=torch.float32)
    layer = 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128
    assert sum(parameter.numel() for parameter in model.parameters()) == 4 * layer + 2 * 259 * 128 + 128


def test_the_base_repeats_what_it_has_seen_once() -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "base", dtype=torch.float32)
    rng = random.Random(0)
    pieces = [[3 + byte for byte in rng.sample(range(33, 127), 8)] for _ in range(32)]
    ids = torch.tensor([[1, *piece, *piece] for piece in pieces])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    nats = torch.nn.functional.cross_entropy(logits[:, 9:16].flatten(0, 1), ids[:, 10:].flatten())
    assert nats < math.log(94) / 4


@pytest.mark.parametrize("domain", ["totals", "reversal", "codebook", "dates", "reviews"])
def test_the_base_does_not_answer_by_the_domains_rule(domain: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base")
    right = 0
    for row in read_rows(domain, "test")[:8]:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        right += tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) == row["completion"]
    assert right <= 1


def test_everything_shipped_stays_under_four_megabytes() -> None:
    shipped = [path for path in EMBEDDED.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) < 4_000_000
