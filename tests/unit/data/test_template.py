"""Templates over columns, and the benchmarks made of them, on records as their owners publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsmixer.config.benchmarks import benchmarks
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import load_recipe
from dsmixer.config.schema import DataConfig, DomainConfig, RecordTemplate
from dsmixer.data.domains import load_domains
from dsmixer.data.forms import parse_record
from dsmixer.data.template import check_template, templated

# benchmark -> (a record with the columns of its data set, prompt, completion, number of choices)
RECORDS: dict[str, tuple[dict[str, Any], str, str, int]] = {
    "cola": (
        {"sentence": "They drank the pub.", "label": 0, "idx": 1},
        "Sentence: They drank the pub.\nIs this sentence grammatically acceptable? Answer:",
        " no",
        2,
    ),
    "sst2": ({"sentence": "a joy", "label": 1}, "Review: a joy\nSentiment:", " positive", 2),
    "mrpc": (
        {"sentence1": "It fell.", "sentence2": "It went down.", "label": 1},
        "Sentence 1: It fell.\nSentence 2: It went down.\nDo both sentences mean the same? Answer:",
        " yes",
        2,
    ),
    "rte": (
        {"sentence1": "All fell.", "sentence2": "One fell.", "label": 0},
        "Text: All fell.\nClaim: One fell.\nDoes the claim follow? Answer:",
        " yes",
        2,
    ),
    "qqp": (
        {"question1": "Why?", "question2": "When?", "label": 0},
        "Question 1: Why?\nQuestion 2: When?\nDo both questions ask the same? Answer:",
        " no",
        2,
    ),
    "qnli": (
        {"question": "Who?", "sentence": "Ann did.", "label": 0},
        "Question: Who?\nSentence: Ann did.\nDoes the sentence answer the question? Answer:",
        " yes",
        2,
    ),
    "mnli": (
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2},
        "Premise: It rains.\nHypothesis: It is dry.\nRelation:",
        " contradiction",
        3,
    ),
    "arc_easy": (
        {
            "question": "Hot?",
            "choices": {"text": ["ice", "sun", "fog"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "Question: Hot?\n(A) ice\n(B) sun\n(C) fog\nAnswer:",
        " sun",
        3,
    ),
    "arc_challenge": (
        {"question": "Hot?", "choices": {"text": ["ice", "sun"], "label": ["A", "B"]}, "answerKey": "A"},
        "Question: Hot?\n(A) ice\n(B) sun\nAnswer:",
        " ice",
        2,
    ),
    "medqa": (
        {
            "question": "Cure?",
            "options": {"A": "rest", "B": "tea", "C": "sun", "D": "run"},
            "answer_idx": "C",
        },
        "Question: Cure?\n(A) rest\n(B) tea\n(C) sun\n(D) run\nAnswer:",
        " sun",
        4,
    ),
    "piqa": (
        {"goal": "Cool it", "sol1": "ice", "sol2": "fire", "label": 0},
        "Goal: Cool it\nAnswer:",
        " ice",
        2,
    ),
    "hellaswag": (
        {"ctx": "[header] Tea [title] Boil it", "endings": ["then [step] pour.", "run"] * 2, "label": "0"},
        "Tea. Boil it",
        " then pour.",
        4,
    ),
    "boolq": (
        {"passage": "Ice is cold.", "question": "is ice cold", "answer": True},
        "Passage: Ice is cold.\nQuestion: is ice cold?\nAnswer:",
        " yes",
        2,
    ),
    "gsm8k": (
        {"question": "2+3?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
        "Question: 2+3?\nAnswer:",
        " 2+3=5\n#### 5",
        0,
    ),
    "mbpp": (
        {
            "text": "Add.",
            "code": "def f(a):\n    return a",
            "test_list": ["assert f(1)==1", "assert f(2)"],
        },
        '"""\nAdd.\nassert f(1)==1\nassert f(2)\n"""\n',
        "def f(a):\n    return a\n",
        0,
    ),
    "humaneval": (
        {"prompt": "def g():\n", "canonical_solution": "    return 1\n"},
        "def g():\n",
        "    return 1\n",
        0,
    ),
}


def test_every_benchmark_of_the_paper_is_there() -> None:
    assert set(RECORDS) == set(benchmarks)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_as_published_becomes_prompt_choices_and_completion(name: str) -> None:
    record, prompt, completion, num_choices = RECORDS[name]
    entry = DomainConfig(benchmark=name)
    template = entry.template_test
    assert entry.name == name and template is not None
    check_template(template, "template_test")
    example = parse_record(templated(record, template, "x:1"), "auto", "x:1", domain=name)
    assert (example.prompt, example.completion) == (prompt, completion)
    assert len(example.choices or ()) == num_choices
    if num_choices:
        assert example.choices is not None and example.answer is not None
        assert example.choices[example.answer] == completion


def test_humaneval_trains_on_mbpp_and_is_tested_on_itself() -> None:
    entry = DomainConfig(benchmark="humaneval")
    assert (entry.train, entry.subset) == ("google-research-datasets/mbpp", "full")
    assert (entry.test, entry.subset_test, entry.split_test) == (
        "openai/openai_humaneval",
        "openai_humaneval",
        "test",
    )


def test_a_part_that_the_entry_names_itself_is_read_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "p", "completion": " c"}\n')
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps({"q": "Q", "a": ["x", "y"], "right": "y"}) + "\n")
    template = {"prompt": "{{ q }}:", "choices": "a", "answer": "{{ right }}"}
    entry = {"benchmark": "gsm8k", "train": str(own), "test": str(raw), "template_test": template}
    (domain,) = load_domains(DataConfig(domains=[entry]), seed=0, quarantine=None)
    assert (domain.name, domain.train[0].prompt, domain.train[0].completion) == ("gsm8k", "p", " c")
    assert (domain.test[0].prompt, domain.test[0].choices, domain.test[0].answer) == ("Q:", (" x", " y"), 1)


@pytest.mark.parametrize(
    ("template", "record", "said"),
    [
        (
            {"prompt": "{{ q }}", "completion": "{{ gone }}"},
            {"q": "Q"},
            r"(?s)'gone' is undefined.*record has: q",
        ),
        ({"prompt": "{{ q }}", "choices": "q", "answer": "0"}, {"q": "Q"}, "gives no list of texts"),
        (
            {"prompt": "{{ q }}", "choices": "n", "answer": "0"},
            {"q": "Q", "n": [1, 2]},
            "gives no list of texts",
        ),
        ({"prompt": "{{ q }}", "choices": "gone", "answer": "0"}, {"q": "Q"}, "template.choices"),
        ({"prompt": "{{ q.__class__.__mro__ }}", "completion": "c"}, {"q": "Q"}, "unsafe|is undefined"),
        (
            {"prompt": "{{ q }}", "completion": "{{ c | regex_replace('(', '') }}"},
            {"q": "Q", "c": "c"},
            "template",
        ),
    ],
)
def test_a_record_that_a_template_does_not_fit_is_one_error_with_its_place(
    template: dict[str, Any], record: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        templated(record, RecordTemplate(**template), "raw.jsonl:7")
    assert str(error.value).startswith("raw.jsonl:7: template.")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"prompt": "{{ q", "completion": "c"}, r"domains.0.template.prompt.*is no template"),
        ({"prompt": "q", "choices": "a b", "answer": "0"}, r"template.choices.*is no template"),
        ({"prompt": "q"}, "a completion, or choices and the answer"),
        ({"prompt": "q", "choices": "a"}, "a completion, or choices and the answer"),
    ],
)
def test_a_broken_template_is_refused_with_its_key_before_data_is_read(
    template: dict[str, Any], said: str
) -> None:
    entry = {"name": "a", "train": "not/there.jsonl", "template": template}
    with pytest.raises(UserError, match=said):
        load_domains(DataConfig(domains=[entry]), seed=0, quarantine=None)


def test_an_unknown_benchmark_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"base": {"model": "m"}, "data": {"domains": [{"benchmark": "gsm9k"}]}}))
    with pytest.raises(UserError, match="gsm9k"):
        load_recipe(recipe)
