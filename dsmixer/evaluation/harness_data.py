"""Benchmarks in folders of JSON lines, for the task files of ``dsmixer/evaluation/tasks``.

``FOLDER/NAME/test.jsonl``, and ``train.jsonl`` for solved examples, hold records with ``prompt`` and
``completion``; where answers are given also ``choices`` and ``answer``. lm-eval calls what is here by the
names that stand in the task files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from datasets import Dataset

from dsmixer.config.errors import UserError

DATA_VARIABLE = "DSMIXER_TASK_DATA"
"""The environment variable that names the folder of the benchmarks."""

TEXT_FIELDS = ("prompt", "completion")
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
FINAL_MARK = "####"


def benchmark(
    benchmark: str, fields: Sequence[str] = (), data_folder: str | None = None, **other: Any
) -> dict[str, Dataset]:
    """The parts of a benchmark.

    Args:
        benchmark: name of its folder.
        fields: keys that each record has to have, beside prompt and completion.
        data_folder: where the folders of the benchmarks are (``--metadata`` of lm-eval's own command line);
            None: what ``DSMIXER_TASK_DATA`` says.
        other: what lm-eval hands to every task.

    Returns:
        ``test``, and ``train``, which is empty where there is no such file.

    Raises:
        UserError: the folder is not told or not there, or a record is bad.
    """
    told = data_folder or os.environ.get(DATA_VARIABLE)
    if not told:
        raise UserError(
            f"the task dsmixer_{benchmark} reads its records from a folder that you name",
            where=f"environment: {DATA_VARIABLE}",
            fix=f"set it to a folder that has {benchmark}/test.jsonl",
        )
    folder = Path(told) / benchmark
    needed = (*TEXT_FIELDS, *fields)
    test = _records(folder / "test.jsonl", needed)
    train = _records(folder / "train.jsonl", needed) if (folder / "train.jsonl").is_file() else []
    whole = Dataset.from_list(test)
    return {"test": whole, "train": Dataset.from_list(train) if train else whole.select([])}


def _records(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        fix = f"check {DATA_VARIABLE}: a folder with a folder a benchmark, and in that test.jsonl"
        raise UserError(f"can't be read: {error.strerror}", where=str(path), fix=fix) from error
    found = [
        _record(line, f"{path}:{number}", fields) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise UserError("no record", where=str(path), fix="give it one record a line")
    return found


def _record(line: str, where: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=where, fix="write one JSON object a line") from error
    if not isinstance(record, dict):
        raise UserError("not a JSON object", where=where, fix="write one JSON object a line")
    missing = [name for name in fields if record.get(name) is None]
    if missing:
        raise UserError(f"no {', '.join(missing)}", where=where, fix=f"give each record {', '.join(fields)}")
    texts = [record[name] for name in TEXT_FIELDS]
    if "choices" in fields:
        texts += record["choices"] if isinstance(record["choices"], list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError("prompt, completion and choices have to be texts", where=where, fix="write them so")
    if "answer" in fields and record["answer"] not in range(len(record["choices"])):
        problem = f"answer {record['answer']!r} is no place in {len(record['choices'])} choices"
        raise UserError(problem, where=where, fix="write the place of the right choice, from 0")
    return record


def final_number(text: str) -> Decimal | None:
    """The number behind the first ``####``, GSM8K's mark of an answer; without one, the last number.

    ``$`` and the commas of thousands do not count, and 18.0 is 18.
    """
    marked = text.partition(FINAL_MARK)[2]
    found = NUMBER.findall(marked)[:1] or NUMBER.findall(text)[-1:]
    return Decimal(re.sub(r"[$,]", "", found[0])) if found else None


def number_match(record: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """``exact_match``: whether an answer's final number is the solution's."""
    wanted, written = final_number(record["completion"]), final_number(results[0])
    return {"exact_match": float(wanted is not None and wanted == written)}
