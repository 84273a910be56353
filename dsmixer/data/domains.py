"""The domains of a recipe: their examples, capped, with bad records refused or set aside."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsmixer.config.errors import UserError
from dsmixer.config.schema import NAME_PATTERN, DataConfig, DomainConfig, RecordTemplate, SourceConfig
from dsmixer.data.forms import parse_record
from dsmixer.data.readers import read_rows
from dsmixer.data.records import Example, field_error
from dsmixer.data.seeds import generator
from dsmixer.data.template import check_template, templated

MAX_QUARANTINED_CHARACTERS = 10_000


@dataclass(frozen=True)
class Domain:
    """One domain with its examples in source order.

    Attributes:
        name: the domain's name; its index in the list of domains is its domain id.
        expert: name of the expert that serves it.
        weight: how often each training example is seen an epoch.
        train: training examples.
        test: held-out examples, possibly none.
        skipped: bad records that were passed over (``on_bad_record: skip``).
    """

    name: str
    expert: str
    weight: float
    train: list[Example]
    test: list[Example]
    skipped: int = 0


@dataclass
class BadRecords:
    """What happens to bad records: the first one raises, or all are counted and remembered.

    Attributes:
        skip: whether bad records are passed over.
        entries: what the quarantine file will hold, one object a record.
    """

    skip: bool
    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, error: UserError, location: str, record: object, domain: str) -> None:
        """Raise the error, or remember it with the record."""
        if not self.skip:
            raise error
        shown = json.dumps(record, default=str)[:MAX_QUARANTINED_CHARACTERS]
        entry = {
            "domain": domain,
            "location": location,
            "problem": str(error).split("\n")[0],
            "record": shown,
        }
        self.entries.append(entry)

    def write(self, path: Path) -> None:
        """Write the entries as JSON lines, if there are any.

        Raises:
            UserError: the file cannot be written.
        """
        if not self.entries:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write the quarantine file: {error}", where=str(path)) from error


def load_domains(data: DataConfig, *, seed: int, quarantine: Path | None) -> list[Domain]:
    """Read the train and test parts of all domains.

    Domains come in the recipe's order; those named by a column come sorted by name.

    Args:
        data: the recipe's data section.
        seed: decides which examples a cap keeps; source order is kept.
        quarantine: file for skipped records, written if there are any; None: they are only counted.

    Raises:
        UserError: a template, source or record is bad, or a domain has no training example.
    """
    for index, entry in enumerate(data.domains):
        for key, template in (("template", entry.template), ("template_test", entry.template_test)):
            if template is not None:
                check_template(template, f"data.domains.{index}.{key}")
    bad = BadRecords(skip=data.on_bad_record == "skip")
    if data.source is not None:
        domains = _column_domains(data.source, seed, bad)
    else:
        domains = [_one_domain(entry, seed, bad) for entry in data.domains]
    if quarantine is not None:
        bad.write(quarantine)
    if not domains:
        raise UserError("no domains", where="data.domains", fix="list at least one domain")
    for index, domain in enumerate(domains):
        if not domain.train:
            _refuse_empty(domain, index, data)
    return domains


def _refuse_empty(domain: Domain, index: int, data: DataConfig) -> None:
    # a domain that a column names has at least the record that names it
    problem = f"no training example of domain {domain.name} in {data.domains[index].train}"
    if domain.skipped:
        problem += f" ({domain.skipped} bad records were skipped)"
    fix = "give it data, or take the domain out"
    raise UserError(problem, where=f"data.domains.{index}.train", fix=fix)


def _one_domain(entry: DomainConfig, seed: int, bad: BadRecords) -> Domain:
    before = len(bad.entries)
    parts = {}
    subset_test, template_test = entry.subset_test or entry.subset, entry.template_test or entry.template
    for part, source, split, subset, template, cap in (
        ("train", entry.train, entry.split_train, entry.subset, entry.template, entry.max_train),
        ("test", entry.test, entry.split_test, subset_test, template_test, entry.max_test),
    ):
        rows: Iterable[Example] = ()
        if source is not None:
            rows = read_examples(source, split, subset, entry.form, bad, domain=entry.name, template=template)
        parts[part] = capped(rows, cap, generator(seed, "cap", part, entry.name))
    expert = entry.expert or entry.name
    return Domain(entry.name, expert, entry.weight, **parts, skipped=len(bad.entries) - before)


def _column_domains(source: SourceConfig, seed: int, bad: BadRecords) -> list[Domain]:
    """One domain for each value of the column in the train data."""

    def read(path: str, split: str) -> dict[str, list[Example]]:
        rows = read_examples(path, split, source.subset, source.form, bad, column=source.column)
        return _by_domain(rows)

    train = read(source.train, source.split_train)
    test = read(source.test, source.split_test) if source.test else {}
    if unknown := sorted(set(test) - set(train)):
        example = test[unknown[0]][0]
        problem = f"the domain {unknown[0]!r} has test but no train examples"
        raise field_error(example.location, source.column, problem, "add train examples, or take these out")
    skipped: dict[str, int] = {}
    for row in bad.entries:
        skipped[row["domain"]] = skipped.get(row["domain"], 0) + 1
    return [
        Domain(
            name,
            name,
            source.weight,
            capped(train[name], source.max_train, generator(seed, "cap", "train", name)),
            capped(test.get(name, ()), source.max_test, generator(seed, "cap", "test", name)),
            skipped.get(name, 0),
        )
        for name in sorted(train)
    ]


def read_examples(
    source: str,
    split: str,
    subset: str | None,
    form: str,
    bad: BadRecords,
    *,
    domain: str = "",
    column: str | None = None,
    template: RecordTemplate | None = None,
) -> Iterator[Example]:
    """The examples of one source.

    Args:
        source: file, folder or hub id; ``split`` and ``subset`` as in ``read_records``.
        form: record form, see ``parse_record``.
        bad: told of each bad record.
        domain: the domain of all examples, unless ``column`` is given.
        column: the field that names each record's domain.
        template: makes the form's fields of a record's columns.

    Raises:
        UserError: the source cannot be read, or a record is bad and bad records are not skipped.
    """
    for row, location in read_rows(source, split=split, subset=subset):
        name = domain
        try:
            if isinstance(row, UserError):
                raise row
            if column is not None:
                name = _named_domain(row, column, location)
            fields = row if template is None else templated(row, template, location)
            example = parse_record(fields, form, location, domain=name)
        except UserError as error:
            bad.add(error, location, None if isinstance(row, UserError) else row, name)
        else:
            yield example


def _named_domain(row: dict[str, Any], column: str, location: str) -> str:
    name = row.get(column)
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        # It becomes the name of a folder, so it is held to what the recipe's own names are held to.
        problem = "the field is missing" if name is None else f"{name!r} is not a domain name"
        raise field_error(location, column, problem, "letters, digits, dot, dash and underscore, at most 100")
    return name


def _by_domain(examples: Iterable[Example]) -> dict[str, list[Example]]:
    grouped: dict[str, list[Example]] = {}
    for example in examples:
        grouped.setdefault(example.domain, []).append(example)
    return grouped


def capped(examples: Iterable[Example], cap: int | None, random: np.random.Generator) -> list[Example]:
    """At most ``cap`` of the examples, each set equally likely, in their order (reservoir, one pass)."""
    kept: list[tuple[int, Example]] = []
    for i, example in enumerate(examples):
        if cap is None or len(kept) < cap:
            kept.append((i, example))
        elif (slot := int(random.integers(i + 1))) < cap:
            kept[slot] = (i, example)
    return [example for _, example in sorted(kept, key=lambda pair: pair[0])]


def domain_ids(examples: Sequence[Example], names: Sequence[str]) -> np.ndarray:
    """Each example's index in ``names``, int64 ``[N]``; ``len(names)`` where it is not among them."""
    index = {name: i for i, name in enumerate(names)}
    return np.array([index.get(example.domain, len(names)) for example in examples], dtype=np.int64)
