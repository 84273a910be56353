"""Rows of the file formats, each with the place it stands at.

A reader yields ``(row, location)``; a row that alone is bad comes as the ``UserError`` itself, so that a
caller may skip it. What spoils the rest of the file (a broken quote, a damaged archive) is raised.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsmixer.config.errors import UserError
from dsmixer.data.records import MAX_TEXT_CHARACTERS

Row = dict[str, Any] | UserError

MAX_LINE_BYTES = 8 * MAX_TEXT_CHARACTERS
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ENCODING_FIX = "save the file as UTF-8"
PARQUET_BATCH_ROWS = 1024


def rows_of_file(path: Path) -> Iterator[tuple[Row, str]]:
    """The rows of one file, read by its suffix.

    Raises:
        UserError: the suffix is unknown, or the file cannot be read on.
    """
    suffix = known_suffix(path)
    if suffix is None:
        raise UserError(
            f"unknown file type {path.suffix!r}", where=str(path), fix=f"one of {', '.join(FORMATS)}"
        )
    try:
        yield from FORMATS[suffix](path)
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path), fix="replace the file") from error


def known_suffix(path: Path) -> str | None:
    """The suffix of ``FORMATS`` that the file's name ends with."""
    name = path.name.lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def _lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without a byte order mark; only ``\\n`` ends a line: JSON text may hold others."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            problem = f"the line is longer than {MAX_LINE_BYTES:,} bytes"
            raise UserError(problem, where=f"{path}:{number}", fix="split the record")
        yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line


def _object(value: Any, location: str) -> Row:
    if isinstance(value, dict):
        return value
    problem = f"expected an object of fields, found {type(value).__name__}"
    return UserError(problem, where=location, fix='write {"prompt": …, "completion": …}')


def jsonl_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """One JSON object a line, plain or gzipped; empty lines are passed over."""
    opener: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as stream:
        for number, line in _lines(stream, path):
            if line.strip():
                location = f"{path}:{number}"
                yield _parsed_line(line, location), location


def _parsed_line(line: bytes, location: str) -> Row:
    try:
        return _object(json.loads(line.decode("utf-8")), location)
    except UnicodeDecodeError as error:
        return UserError(f"not UTF-8 text ({error.reason})", where=location, fix=ENCODING_FIX)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} at column {error.colno}"
        return UserError(problem, where=location, fix="one JSON object a line")
    except (ValueError, RecursionError) as error:
        return UserError(f"not usable JSON: {error}", where=location, fix="one JSON object a line")


def json_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """A list of objects, or objects one after the other; a row's line is the one it starts on."""
    content = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"not UTF-8 text ({error.reason})", where=f"{path}:{line}", fix=ENCODING_FIX
        ) from error
    position, line, in_list = 0, 1, text.lstrip()[:1] == "["
    start = _skip(text, text.index("[") + 1 if in_list else 0, "")
    while start < len(text) and not (in_list and text[start] == "]"):
        line, position = line + text.count("\n", position, start), start
        value, end = _decoded(text, start, path)
        yield _object(value, f"{path}:{line}"), f"{path}:{line}"
        start = _skip(text, end, "," if in_list else "")
    if in_list:
        _check_list_end(text, start, path)


def _skip(text: str, position: int, separator: str) -> int:
    """The position of the next value: after blanks, and after one separator if there is one."""
    for mark in (separator, ""):
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        if mark and text.startswith(mark, position):
            position += 1
    return position


def _decoded(text: str, start: int, path: Path) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} at column {error.colno}"
        raise UserError(problem, where=f"{path}:{error.lineno}", fix="a list of JSON objects") from error
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, start) + 1
        raise UserError(
            f"not usable JSON: {error}", where=f"{path}:{line}", fix="a list of objects"
        ) from error


def _check_list_end(text: str, position: int, path: Path) -> None:
    rest = text[position:].strip()
    if rest != "]":
        line = text.count("\n", 0, position) + 1
        problem = "the list is not closed" if not rest else "text follows the end of the list"
        raise UserError(problem, where=f"{path}:{line}", fix="one list of objects, ending with ]")


def table_rows(path: Path, delimiter: str) -> Iterator[tuple[Row, str]]:
    """Rows under a header line, quoted as spreadsheets and pandas write them, tsv too.

    Quotes are read strictly: a stray one would silently swallow the lines after it.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_TEXT_CHARACTERS))
    with path.open("rb") as stream:
        reader = csv.reader(_decoded_lines(stream, path), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                fix = 'quote a cell that holds quotes, and double them inside: "he said ""hi"""'
                raise UserError(f"broken row: {error}", where=f"{path}:{line}", fix=fix) from error
            if cells is None:
                return
            if header is None and cells:
                header = _checked_header(cells, f"{path}:{line}")
            elif header is not None and cells:
                yield _table_row(header, cells, f"{path}:{line}"), f"{path}:{line}"
            line = reader.line_num + 1


def _decoded_lines(stream: IO[bytes], path: Path) -> Iterator[str]:
    for number, line in _lines(stream, path):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text ({error.reason})"
            raise UserError(problem, where=f"{path}:{number}", fix=ENCODING_FIX) from error


def _checked_header(cells: list[str], location: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "" in names or len(set(names)) != len(names):
        problem = f"the header has empty or repeated names: {', '.join(map(repr, names))}"
        raise UserError(problem, where=location, fix="name every column once")
    return names


def _table_row(header: list[str], cells: list[str], location: str) -> Row:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    problem = f"{len(cells)} cells where the header names {len(header)} columns"
    return UserError(problem, where=location, fix="quote cells that hold the separator or a line break")


def parquet_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """The rows of a parquet file, counted from 1."""
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(PARQUET_BATCH_ROWS):
                for row in _batch_rows(batch):
                    number += 1
                    location = f"{path}:row {number}"
                    if isinstance(row, str):
                        yield UserError(row, where=location, fix=ENCODING_FIX), location
                    else:
                        yield row, location
    except pa.ArrowException as error:
        where = f"{path}:row {number + 1}" if number else str(path)
        raise UserError(
            f"not a readable parquet file: {error}", where=where, fix="replace the file"
        ) from error


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """The rows of a batch; for a row whose bytes are not text, what is wrong with it."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [f"not UTF-8 text ({error.reason})"]
        return [row for i in range(batch.num_rows) for row in _batch_rows(batch.slice(i, 1))]


FORMATS: dict[str, Callable[[Path], Iterator[tuple[Row, str]]]] = {
    ".jsonl": jsonl_rows,
    ".jsonl.gz": jsonl_rows,
    ".json": json_rows,
    ".csv": lambda path: table_rows(path, ","),
    ".tsv": lambda path: table_rows(path, "\t"),
    ".parquet": parquet_rows,
}
