"""Public benchmarks as domains: where each is on the hub, and the texts that its records become.

``benchmark: NAME`` in an entry of ``data.domains`` stands for these keys; what the entry itself says goes
before them. Ids, subsets and splits are those of lm-evaluation-harness, but for MedQA and BoolQ, which are
read as they were first published; the texts are ours. Parts without public labels are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Keys = Mapping[str, Any]
BenchmarkName = Literal[
    "cola",
    "sst2",
    "mrpc",
    "rte",
    "qqp",
    "qnli",
    "mnli",
    "arc_easy",
    "arc_challenge",
    "medqa",
    "piqa",
    "hellaswag",
    "boolq",
    "gsm8k",
    "mbpp",
    "humaneval",
]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        train: keys of the train part: ``source``, ``split``, ``subset`` and ``template``.
        test: keys of the test part.
    """

    train: Keys
    test: Keys


@dataclass(frozen=True)
class _Source:
    """A data set of the hub whose two parts have the same columns."""

    id: str
    template: Keys
    subset: str | None = None
    train: str = "train"
    test: str = "test"

    def part(self, split: str) -> Keys:
        return {"source": self.id, "split": split, "subset": self.subset, "template": self.template}

    def benchmark(self) -> Benchmark:
        return Benchmark(self.part(self.train), self.part(self.test))


def _glue(subset: str, prompt: str, choices: list[str], test: str = "validation") -> Benchmark:
    template = {"prompt": prompt, "choices": choices, "answer": "{{ label }}"}
    return _Source("nyu-mll/glue", template, subset, test=test).benchmark()


_NO_YES, _YES_NO = ["no", "yes"], ["yes", "no"]

_ARC = {
    "prompt": "Question: {{ question }}\n"
    "{% for text in choices.text %}({{ 'ABCDE'[loop.index0] }}) {{ text }}\n{% endfor %}Answer:",
    "choices": "choices.text",
    "answer": "{{ choices.label.index(answerKey) }}",
}
_MEDQA = {
    "prompt": "Question: {{ question }}\n"
    "{% for letter in 'ABCD' %}({{ letter }}) {{ options[letter] }}\n{% endfor %}Answer:",
    "choices": "[options.A, options.B, options.C, options.D]",
    "answer": "{{ answer_idx }}",
}
_HELLASWAG = {
    # marks of WikiHow's headings stand in its texts
    "prompt": "{{ ctx | replace(' [title]', '.') | regex_replace('\\[.*?\\]', '') "
    "| replace('  ', ' ') | trim }}",
    "choices": "endings | map('replace', ' [title]', '.') | map('regex_replace', '\\[.*?\\]', '') "
    "| map('replace', '  ', ' ') | map('trim')",
    "answer": "{{ label }}",
}
_GSM8K = {
    "prompt": "Question: {{ question }}\nAnswer:",
    "completion": "{{ answer | regex_replace('<<.*?>>', '') }}",
}
_MBPP = _Source(
    "google-research-datasets/mbpp",
    {
        "prompt": '"""\n{{ text }}\n{{ test_list | join("\n") }}\n"""\n',
        "completion": "{{ code }}\n",
        "separator": "",
    },
    "full",
)
_HUMANEVAL = _Source(
    "openai/openai_humaneval",
    {"prompt": "{{ prompt }}", "completion": "{{ canonical_solution }}", "separator": ""},
    "openai_humaneval",
)

benchmarks: dict[BenchmarkName, Benchmark] = {
    "cola": _glue(
        "cola", "Sentence: {{ sentence }}\nIs this sentence grammatically acceptable? Answer:", _NO_YES
    ),
    "sst2": _glue("sst2", "Review: {{ sentence }}\nSentiment:", ["negative", "positive"]),
    "mrpc": _glue(
        "mrpc",
        "Sentence 1: {{ sentence1 }}\nSentence 2: {{ sentence2 }}\nDo both sentences mean the same? Answer:",
        _NO_YES,
        "test",
    ),
    "rte": _glue(
        "rte", "Text: {{ sentence1 }}\nClaim: {{ sentence2 }}\nDoes the claim follow? Answer:", _YES_NO
    ),
    "qqp": _glue(
        "qqp",
        "Question 1: {{ question1 }}\nQuestion 2: {{ question2 }}\nDo both questions ask the same? Answer:",
        _NO_YES,
    ),
    "qnli": _glue(
        "qnli",
        "Question: {{ question }}\nSentence: {{ sentence }}\nDoes the sentence answer the question? Answer:",
        _YES_NO,
    ),
    "mnli": _glue(
        "mnli",
        "Premise: {{ premise }}\nHypothesis: {{ hypothesis }}\nRelation:",
        ["entailment", "neutral", "contradiction"],
        "validation_matched",
    ),
    "arc_easy": _Source("allenai/ai2_arc", _ARC, "ARC-Easy").benchmark(),
    "arc_challenge": _Source("allenai/ai2_arc", _ARC, "ARC-Challenge").benchmark(),
    "medqa": _Source("GBaker/MedQA-USMLE-4-options", _MEDQA).benchmark(),
    "piqa": _Source(
        "baber/piqa",
        {"prompt": "Goal: {{ goal }}\nAnswer:", "choices": "[sol1, sol2]", "answer": "{{ label }}"},
        test="validation",
    ).benchmark(),
    "hellaswag": _Source("Rowan/hellaswag", _HELLASWAG, test="validation").benchmark(),
    "boolq": _Source(
        "google/boolq",
        {
            "prompt": "Passage: {{ passage }}\nQuestion: {{ question }}?\nAnswer:",
            "choices": _NO_YES,
            "answer": "{{ answer | int }}",
        },
        test="validation",
    ).benchmark(),
    "gsm8k": _Source("openai/gsm8k", _GSM8K, "main").benchmark(),
    "mbpp": _MBPP.benchmark(),
    "humaneval": Benchmark(_MBPP.part("train+validation+test+prompt"), _HUMANEVAL.part("test")),
}
"""By name. HumanEval has no train part of its own: all of MBPP is trained on, as in the paper."""


def filled(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of ``data.domains`` with the keys that its ``benchmark`` stands for.

    A part whose source the entry names itself is read as the entry says: nothing of the benchmark's goes
    into it.
    An entry without a benchmark, or with an unknown one, comes back as it is.
    """
    known = {str(name): benchmark for name, benchmark in benchmarks.items()}.get(str(entry.get("benchmark")))
    if known is None:
        return dict(entry)
    keys: dict[str, Any] = {"name": entry["benchmark"]}
    for part, suffix, own in (("train", "", known.train), ("test", "_test", known.test)):
        if part not in entry:
            keys |= {
                part: own["source"],
                f"split_{part}": own["split"],
                f"subset{suffix}": own["subset"],
                f"template{suffix}": own["template"],
            }
    return keys | dict(entry)
