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
from dsmixer.data.forms import parse_record
from dsmixer.data.records import checked_text, field_error

DATA_VARIABLE = "DSMIXER_TASK_DATA"
"""The environment variable that names the folder of the benchmarks."""

TEXT_FIELDS = ("prompt", "completion")
KINDS = {
    **dict.fromkeys(("test", "entry_point", "test_setup_code"), "text"),
    "test_list": "texts",
}
"""What other fields of the tasks here hold."""
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
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        fix = "save the file as UTF-8"
        raise UserError(f"not UTF-8: {error.reason}", where=f"{path}:{line}", fix=fix) from error
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
    choice = {"choices", "answer"} <= set(fields)
    example = parse_record(record, "multiple_choice" if choice else "prompt_completion", where)
    for name in fields:
        _check_kind(record[name], KINDS.get(name), where, name)
    # an answer may stand there as a letter or a text; lm-eval takes its place alone
    return {**record, "choices": list(example.choices or ()), "answer": example.answer} if choice else record


def _check_kind(value: Any, kind: str | None, where: str, name: str) -> None:
    if kind == "text":
        checked_text(value, where, name)
    elif kind == "texts":
        if not isinstance(value, list):
            raise field_error(where, name, f"expected a list, found {value!r:.60}", "write a list of texts")
        for place, text in enumerate(value):
            checked_text(text, where, f"{name}[{place}]")


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
