"""Each file format gives the same records as it was given, and a bad row is found with its file and line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsmixer.config.errors import UserError
from dsmixer.data.forms import parse_record
from dsmixer.data.readers import read_records

RECORDS = [
    {"prompt": 'two\nlines, "quoted"', "completion": " a\tb"},
    {"prompt": "ünï\u2028cödé 🙂", "completion": " x"},
    {"prompt": "", "completion": " ,y"},
]
FORMATS = ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"]


def write(folder: Path, suffix: str, records: list[dict[str, Any]], name: str = "data") -> Path:
    path = folder / f"{name}.{suffix}"
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if suffix == "jsonl":
        path.write_text(lines, encoding="utf-8")
    elif suffix == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif suffix == "json":
        path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    return path


def read(path: Path | str, **how: Any) -> list[dict[str, Any]]:
    return [record for record, _ in read_records(str(path), **how)]


def problem_of(path: Path | str, **how: Any) -> str:
    with pytest.raises(UserError) as error:
        read(path, **how)
    return str(error.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_format_gives_back_what_was_written(tmp_path: Path, suffix: str) -> None:
    assert read(write(tmp_path, suffix, RECORDS)) == RECORDS


@pytest.mark.parametrize(
    ("suffix", "place"),
    # The first table row holds a line break, so the third one starts on line 5; the JSON list is indented.
    [("jsonl", "3"), ("jsonl.gz", "3"), ("json", "10"), ("csv", "5"), ("tsv", "5"), ("parquet", "row 3")],
)
def test_a_bad_field_is_found_with_file_line_and_field(tmp_path: Path, suffix: str, place: str) -> None:
    path = write(tmp_path, suffix, [*RECORDS[:2], {"prompt": "no completion", "completion": ""}])
    with pytest.raises(UserError) as error:
        for record, location in read_records(str(path)):
            parse_record(record, "auto", location)
    assert str(error.value).startswith(f"{path}:{place}: completion: the text is empty")


BROKEN = {
    "jsonl": ("x.jsonl", b'{"a": 1}\n\n{"a": \n', ":3: not valid JSON"),
    "jsonl of lists": ("x.jsonl", b'{"a": 1}\n[1]\n', ":2: expected an object of fields, found list"),
    "jsonl in latin-1": ("x.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', ":2: not UTF-8"),
    "jsonl nested too deep": ("x.jsonl", b"[" * 100_000, ":1: not usable JSON"),
    "gzip cut short": ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-20], ": cannot be read"),
    "gzip that is none": ("x.jsonl.gz", b'{"a": 1}\n', ": cannot be read"),
    "json": ("x.json", b'[{"a": 1},\n {"a": 2},\n {"a" 3}]', ":3: not valid JSON"),
    "json not closed": ("x.json", b'[{"a": 1},\n {"a": 2}\n', ":3: the list is not closed"),
    "json goes on": ("x.json", b'[{"a": 1}]\n[2]', ":1: text follows"),
    "json of numbers": ("x.json", b'[{"a": 1},\n\n 7]', ":3: expected an object of fields, found int"),
    "json in latin-1": ("x.json", b'[{"a": 1},\n{"a": "\xe9"}]', ":2: not UTF-8"),
    "csv with a cell too many": ("x.csv", b"a,b\n1,2\n1,2,3\n", ":3: 3 cells where the header names 2"),
    "csv with an open quote": ("x.csv", b'a,b\n1,2\n"1,2\n3,4\n', ":3: broken row"),
    "csv in latin-1": ("x.csv", b"a,b\n1,2\n1,\xe9\n", ":3: not UTF-8"),
    "csv with a header twice": ("x.csv", b"a,a\n1,2\n", ":1: the header has empty or repeated names"),
    "tsv with a cell too few": ("x.tsv", b"a\tb\n1\t2\n1\n", ":3: 1 cells where the header names 2"),
    "tsv with a stray quote": ("x.tsv", b'a\tb\n"so" he said\t2\n', ":2: broken row"),
    "parquet": ("x.parquet", b"PAR1 not really PAR1", ": not a readable parquet file"),
    "unknown type": ("x.xlsx", b"", ": unknown file type '.xlsx'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_an_error_with_file_and_line(tmp_path: Path, case: str) -> None:
    name, content, problem = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(content)
    assert problem_of(path).startswith(f"{path}{problem}")


def test_parquet_bytes_that_are_no_text_are_found_by_row(tmp_path: Path) -> None:
    column = pa.array([b"a", b"b", b"\xff"]).cast(pa.binary())
    texts = pa.StringArray.from_buffers(3, column.buffers()[1], column.buffers()[2])
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "x.parquet")
    assert problem_of(tmp_path / "x.parquet").startswith(f"{tmp_path}/x.parquet:row 3: not UTF-8")


def test_json_may_be_objects_one_after_the_other_and_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a":\n 2}\n')
    assert [(r["a"], place) for r, place in read_records(str(path))] == [(1, f"{path}:1"), (2, f"{path}:2")]


def test_a_folder_is_read_in_sorted_order_and_other_files_are_left(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path, "jsonl", [{"name": name}], name)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    assert [record["name"] for record in read(tmp_path)] == ["a", "b", "c"]


def test_a_folder_of_splits_gives_only_the_split_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [{"part": "train"}], "train-00000-of-00001")
    write(tmp_path, "jsonl", [{"part": "test"}], "test")
    assert read(tmp_path, split="train") == [{"part": "train"}]
    assert read(tmp_path, split="test") == [{"part": "test"}]
    assert "no file of split 'validation', only test.jsonl, train" in problem_of(tmp_path, split="validation")


def test_folders_without_data_or_in_the_format_of_save_to_disk_are_refused(tmp_path: Path) -> None:
    assert "no data file in the folder" in problem_of(tmp_path)
    datasets.Dataset.from_list([{"prompt": "x"}]).save_to_disk(str(tmp_path / "saved"))
    assert "written by save_to_disk" in problem_of(tmp_path / "saved")


@pytest.mark.parametrize(
    "name", ["./nothing", "nothing.jsonl", "/a/b", "a/b/c", "what is this?", "~/x", "a/b.csv"]
)
def test_a_path_that_is_not_there_is_told_without_asking_the_hub(name: str) -> None:
    assert problem_of(name).startswith(f"{name}: no such file")


def test_a_hub_id_is_loaded_with_its_subset_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **how: object) -> datasets.Dataset:
        asked.append((path, how))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = list(read_records("owner/name@v1.0", split="validation", subset="main"))
    assert asked == [("owner/name", {"name": "main", "split": "validation", "revision": "v1.0"})]
    assert found[1] == (RECORDS[1], "owner/name@v1.0[validation]:row 2")


def test_a_hub_id_that_cannot_be_loaded_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert problem_of("no-such-owner/no-such-name").startswith(
        "no-such-owner/no-such-name: neither a file here"
    )
