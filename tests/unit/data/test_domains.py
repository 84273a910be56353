"""Domains as the recipe says: order, caps, columns, bad records refused or set aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmixer.config.errors import UserError
from dsmixer.config.schema import DataConfig
from dsmixer.data.domains import capped, domain_ids, load_domains


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def numbered(count: int, **more: object) -> list[dict[str, object]]:
    return [{"prompt": f"p{i}", "completion": f" c{i}", **more} for i in range(count)]


def prompts(examples: list[Any]) -> list[str]:
    return [example.prompt for example in examples]


def test_domains_keep_the_recipes_order_expert_weight_and_rows(tmp_path: Path) -> None:
    law = {"name": "law", "train": write(tmp_path / "l.jsonl", numbered(3)), "weight": 0.5, "expert": "legal"}
    art = {"name": "art", "train": write(tmp_path / "a.jsonl", numbered(2)), "test": law["train"]}
    domains = load_domains(DataConfig(domains=[law, art]), seed=0, quarantine=None)
    assert [(d.name, d.expert, d.weight) for d in domains] == [("law", "legal", 0.5), ("art", "art", 1.0)]
    assert [prompts(d.train) for d in domains] == [["p0", "p1", "p2"], ["p0", "p1"]]
    assert [len(d.test) for d in domains] == [0, 3]
    assert domains[0].train[2].location == f"{tmp_path}/l.jsonl:3" and domains[0].train[2].domain == "law"
    mixed = [domains[1].train[0], domains[0].train[0]]
    assert domain_ids(mixed, ["law", "art"]).tolist() == [1, 0] and domain_ids(mixed, ["art"]).tolist() == [
        0,
        1,
    ]


def test_caps_are_drawn_with_the_seed_and_keep_source_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(100))
    entry = {"name": "a", "train": path, "test": path, "max_train": 10, "max_test": 5}

    def drawn(seed: int, **more: object) -> tuple[list[str], list[str]]:
        (domain,) = load_domains(DataConfig(domains=[{**entry, **more}]), seed=seed, quarantine=None)
        return prompts(domain.train), prompts(domain.test)

    train, test = drawn(0)
    assert len(train) == 10 and len(test) == 5 and train == sorted(train, key=lambda p: int(p[1:]))
    assert drawn(0) == (train, test) and drawn(1) != (train, test)
    assert train != [f"p{i}" for i in range(10)]
    assert drawn(0, max_train=1000)[0] == [f"p{i}" for i in range(100)]


def test_every_example_is_equally_likely_under_a_cap() -> None:
    counts = np.zeros(12)
    for seed in range(2000):
        for i in capped(range(12), 3, np.random.default_rng(seed)):  # type: ignore[arg-type]
            counts[i] += 1
    assert np.abs(counts / 2000 - 3 / 12).max() < 0.05


def test_a_column_names_the_domains_which_come_sorted(tmp_path: Path) -> None:
    rows = numbered(2, topic="law") + numbered(3, topic="art")
    source = {
        "train": write(tmp_path / "train.jsonl", rows),
        "test": write(tmp_path / "test.jsonl", numbered(4, topic="law")),
        "column": "topic",
        "max_train": 2,
        "weight": 2.0,
    }
    domains = load_domains(DataConfig(source=source), seed=0, quarantine=None)
    assert [(d.name, d.expert, len(d.train), len(d.test)) for d in domains] == [
        ("art", "art", 2, 0),
        ("law", "law", 2, 4),
    ]
    assert {d.weight for d in domains} == {2.0}


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "x" * 101, 5, None, "a\n"])
def test_a_columns_domain_name_cannot_leave_its_folder(tmp_path: Path, name: object) -> None:
    path = write(tmp_path / "a.jsonl", numbered(1, topic="ok") + numbered(1, topic=name))
    config = DataConfig(source={"train": path, "column": "topic"})
    with pytest.raises(UserError, match=r"a\.jsonl:2: topic: "):
        load_domains(config, seed=0, quarantine=None)


def test_a_domain_with_test_but_no_train_examples_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", numbered(1, topic="law"))
    test = write(tmp_path / "test.jsonl", numbered(1, topic="art"))
    config = DataConfig(source={"train": train, "test": test, "column": "topic"})
    with pytest.raises(UserError, match=r"test\.jsonl:1: topic: the domain 'art' has test but no train"):
        load_domains(config, seed=0, quarantine=None)


def test_bad_records_stop_the_run_or_are_skipped_counted_and_quarantined(tmp_path: Path) -> None:
    rows = [*numbered(1), "{broken", {"prompt": "x", "completion": 5}, *numbered(1)]
    path = write(tmp_path / "a.jsonl", rows)
    entry = {"name": "a", "train": path, "test": path}
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    with pytest.raises(UserError, match=r"a\.jsonl:2: not valid JSON"):
        load_domains(DataConfig(domains=[entry]), seed=0, quarantine=quarantine)
    assert not quarantine.exists()

    skipping = DataConfig(domains=[entry], on_bad_record="skip")
    (domain,) = load_domains(skipping, seed=0, quarantine=quarantine)
    assert len(domain.train) == len(domain.test) == 2 and domain.skipped == 4
    entries = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [entry["location"] for entry in entries] == [f"{path}:2", f"{path}:3"] * 2
    assert "completion: expected text, found int 5" in entries[1]["problem"]
    assert json.loads(entries[1]["record"]) == {"prompt": "x", "completion": 5}


def test_an_empty_domain_is_refused_also_when_all_its_records_were_skipped(tmp_path: Path) -> None:
    good = {"name": "good", "train": write(tmp_path / "good.jsonl", numbered(1))}
    empty = {"name": "empty", "train": write(tmp_path / "empty.jsonl", [])}
    bad = {"name": "bad", "train": write(tmp_path / "bad.jsonl", ["{", "{"])}
    with pytest.raises(UserError, match="no training example of domain empty in .*empty.jsonl"):
        load_domains(DataConfig(domains=[good, empty]), seed=0, quarantine=None)
    with pytest.raises(UserError, match=r"domain bad in .*bad.jsonl \(2 bad records were skipped\)"):
        load_domains(DataConfig(domains=[good, bad], on_bad_record="skip"), seed=0, quarantine=None)
    with pytest.raises(UserError, match="no domains"):
        load_domains(DataConfig(), seed=0, quarantine=None)


def test_a_quarantine_file_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    entry = {"name": "a", "train": write(tmp_path / "a.jsonl", [*numbered(1), "{"])}
    with pytest.raises(UserError, match="cannot write the quarantine file"):
        load_domains(
            DataConfig(domains=[entry], on_bad_record="skip"),
            seed=0,
            quarantine=tmp_path / "file" / "quarantine.jsonl",
        )
