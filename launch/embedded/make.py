"""Remakes what the quickstart trains on, from code and seeds alone.

python launch/embedded/make.py domains [--out FOLDER]    seconds: domains/NAME/{train,test}.jsonl
python launch/embedded/make.py base [--out FOLDER]       some 15 minutes on one core: base/
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from domains import DOMAINS, Row, make_rows

HERE = Path(__file__).resolve().parent


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes rows as JSON lines, ``prompt`` first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_domains(folder: Path) -> None:
    """Writes ``NAME/train.jsonl`` and ``NAME/test.jsonl`` of every domain into the folder."""
    for domain in DOMAINS:
        train, test = make_rows(domain)
        write_rows(folder / domain.name / "train.jsonl", train)
        write_rows(folder / domain.name / "test.jsonl", test)


def main() -> None:
    """Reads the command line and makes the one part it names."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("part", choices=("domains", "base"))
    parser.add_argument("--out", type=Path, help="where to write; the shipped folder if absent")
    parser.add_argument("--steps", type=int, help="optimizer steps of the base; fewer for a trial")
    arguments = parser.parse_args()
    folder = arguments.out or HERE / arguments.part
    if arguments.part == "domains":
        write_domains(folder)
        return
    from pretrain import Pretraining, write_base

    settings = Pretraining() if arguments.steps is None else Pretraining(steps=arguments.steps)
    write_base(folder, settings)


if __name__ == "__main__":
    main()
