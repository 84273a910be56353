"""Kinds of bad input: for each, files on disk, a command that is wrong, and what its message must say."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RECIPE = """\
run:
  name: mini
  dir: {root}/runs
base:
  model: {base}
  dtype: float32
data:
  max_length: 64
  domains:
    - name: law
      train: {root}/law.jsonl
      test: {root}/law.jsonl
    - name: chess
      train: {root}/chess.jsonl
mixer:
  targets: [q, v]
  rank: 4
  alpha: 8
stage1:
  max_steps: 2
stage2:
  max_steps: 2
  top_k: 2
deepspeed:
  zero_stage: 2
evaluation:
  enabled: false
"""
GOOD = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(8)]
BAD_RECORDS = [*GOOD[:2], {"prompt": "no completion here", "note": "5"}, *GOOD[2:]]


@dataclass(frozen=True)
class Site:
    """A folder of its own for one case: a recipe that is right, with its data, to be spoilt."""

    root: Path
    bases: Path

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        self.recipe.write_text(RECIPE.format(root=self.root, base=self.bases / "llama"))
        for name in ("law", "chess"):
            self.data(f"{name}.jsonl", lines(GOOD))

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def run(self) -> Path:
        return self.root / "runs" / "mini"

    def train(self, *more: str) -> list[str]:
        return ["train", "--config", str(self.recipe), *more]

    def change(self, old: str, new: str) -> None:
        """Replace a piece of the recipe that occurs once."""
        text = self.recipe.read_text()
        assert text.count(old) == 1, (old, text)
        self.recipe.write_text(text.replace(old, new))

    def place(self, text: str) -> str:
        """``recipe.yaml:LINE`` of the line that holds this text."""
        for number, line in enumerate(self.recipe.read_text().splitlines(), 1):
            if text in line:
                return f"{self.recipe}:{number}"
        raise AssertionError(text)

    def data(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def tree(self) -> dict[str, str]:
        """Every file with its digest, every folder, and links."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            content = path.read_bytes() if path.is_file() else b""
            found[str(path.relative_to(self.root))] = f"{path.is_dir()} {hashlib.sha256(content).hexdigest()}"
        return found


Spoil = Callable[[Site], tuple[list[str], list[str]]]
"""Spoils a site; gives the command, and what the message must hold: the place, the field, part of the fix."""

CASES: dict[str, Spoil] = {}


def case(name: str) -> Callable[[Spoil], Spoil]:
    """Register a kind of bad input."""

    def register(spoil: Spoil) -> Spoil:
        assert name not in CASES
        CASES[name] = spoil
        return spoil

    return register


def lines(records: list[dict[str, str]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def fill(folder: Path) -> None:
    """Write until the disk below is full."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(os.urandom(4096))
        except OSError:
            return
