"""Rows of five benchmarks in parts that share none: for adapters, for routers, for choosing, for testing."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.frozen_pool_adapters import SPECS

Row = dict[str, Any]

NAMES = tuple(spec.name for spec in SPECS)


@dataclass(frozen=True)
class Sizes:
    """Rows of each part; ``router`` of all benchmarks together is what the routers train on."""

    adapter: Mapping[str, int]
    router: Mapping[str, int]
    choose: int
    test: int


LONG = Sizes(
    adapter=dict.fromkeys(NAMES, 1600) | {"mbpp": 479},
    router=dict.fromkeys(NAMES, 450) | {"mbpp": 200},
    choose=50,
    test=60,
)
SHORT = Sizes(
    adapter=dict.fromkeys(NAMES, 40),
    router=dict.fromkeys(NAMES, 16),
    choose=4,
    test=6,
)
"""MBPP has 779 train and 195 test rows, ARC-E 2,249 train rows: the sizes of ``LONG`` follow from them."""


@dataclass(frozen=True)
class Pool:
    """Where everything lies."""

    shared: Path
    out: Path
    sizes: Sizes
    ranks: int

    @property
    def base(self) -> Path:
        return self.shared / "models" / "english-7m"

    @property
    def mixed(self) -> Path:
        """The routers' rows, without the names of their benchmarks."""
        return self.out / "rows" / "mixed.jsonl"

    def rows(self, name: str, part: str) -> Path:
        return self.out / "rows" / f"{name}.{part}.jsonl"

    def adapter(self, name: str) -> Path:
        return self.out / "adapters" / name

    def run(self, name: str) -> Path:
        return self.out / "runs" / name


def make_rows(pool: Pool) -> None:
    """Cut the benchmarks and write the parts; a folder with other rows is refused."""
    mixed: list[Row] = []
    for name in NAMES:
        source = pool.shared / "data" / name
        parts = split(read_rows(source / "train.jsonl"), name, pool.sizes)
        parts["test"] = random.Random(f"test {name}").sample(
            read_rows(source / "test.jsonl"), pool.sizes.test
        )
        check_disjoint(name, parts)
        mixed += parts["router"]
        for part, rows in parts.items():
            write_rows(pool.rows(name, part), rows)
    random.Random(0).shuffle(mixed)
    write_rows(pool.mixed, [{key: row[key] for key in ("prompt", "completion")} for row in mixed])


def split(rows: Sequence[Row], name: str, sizes: Sizes) -> dict[str, list[Row]]:
    """A benchmark's train rows in an order of their own, cut into three."""
    shuffled = random.Random(name).sample(rows, len(rows))
    counts = {"adapter": sizes.adapter[name], "router": sizes.router[name], "choose": sizes.choose}
    assert sum(counts.values()) <= len(rows), f"{name} has {len(rows)} train rows"
    remaining = iter(shuffled)
    return {part: [next(remaining) for _ in range(count)] for part, count in counts.items()}


def check_disjoint(name: str, parts: Mapping[str, Sequence[Row]]) -> None:
    """No prompt is in two parts, nor twice in one."""
    prompts = [row["prompt"] for rows in parts.values() for row in rows]
    assert len(prompts) == len(set(prompts)), f"{name}: a prompt is in two parts"


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{path} holds other rows; use another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
