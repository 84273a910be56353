"""A line for each case of what one run of the bench found, or several: for a page.

    python -m tests.bench.summary runs/bench/results.json [MORE.json …] [--plot ratios.svg]

A case that is in several files is taken from the last of them that has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.bench.case import Case
from tests.bench.results import Row, by_case, markdown_table, plot, read_rows
from tests.bench.systems.registry import OURS, REFERENCES, SYSTEMS
from tests.bench.targets import Verdict, check
from tests.bench.timing import Spread

SHORT = {"float32": "f32", "bfloat16": "bf16", "nf4": "NF4"}
Rows = Mapping[str, Row]
Cell = Callable[[Case, Rows], str]


def summary(rows: Sequence[Row]) -> str:
    """Training, its memory, decoding and targets, as tables of Markdown."""
    cases = [(case, {row.system: row for row in found}) for case, found in by_case(rows)]
    training = [(case, found) for case, found in cases if case.what == "train"]
    decoding = [(case, found) for case, found in cases if case.what == "decode"]
    names = [name for name in SYSTEMS if name not in ("base", *REFERENCES)]
    shapes: dict[str, Cell] = {
        "width": lambda case, rows: str(case.width),
        "base": lambda case, rows: SHORT[case.dtype],
        "E": lambda case, rows: str(case.experts),
        "r": lambda case, rows: str(case.rank),
    }
    lengths: dict[str, Cell] = shapes | {"tokens": lambda case, rows: f"{case.tokens:,}"}
    times = lengths | {"PEFT LoRA, ms": _reference_ms}
    times |= {SYSTEMS[name].title: _ratio(name, "to_lora") for name in names}
    times |= {"tokens/s": _tokens_per_second, "of matmul rate": _share}
    peaks = lengths | {SYSTEMS[name].title: _peak(name) for name in SYSTEMS}
    answers = shapes | {"frozen base, ms": _base_ms}
    answers |= {
        SYSTEMS[name].title_of("decode"): _ratio(name, "to_base")
        for name in ("lora", *names)
        if SYSTEMS[name].decodes
    }
    tables = {
        "A training step, times PEFT LoRA; the last two columns are of stage two": _table(training, times),
        "Peak memory of training, MB": _table(training, peaks),
        "A decoded token, times the frozen base": _table(decoding, answers),
        "Targets": _targets(check(rows)),
    }
    return "\n".join(f"{title}:\n\n{table}\n" for title, table in tables.items() if table)


def _table(cases: Sequence[tuple[Case, Rows]], columns: Mapping[str, Cell]) -> str:
    """Without the columns that have nothing to say."""
    found = {head: [cell(case, rows) for case, rows in cases] for head, cell in columns.items()}
    found = {head: body for head, body in found.items() if any(body)}
    return "\n".join(markdown_table(list(found), list(zip(*found.values(), strict=True)))) if found else ""


def _reference_ms(case: Case, rows: Rows) -> str:
    there = [found.median for name in REFERENCES if name in rows and (found := rows[name].seconds)]
    return f"{1e3 * min(there):,.0f}" if there else ""


def _base_ms(case: Case, rows: Rows) -> str:
    found = rows["base"].seconds if "base" in rows else None
    return "" if found is None else f"{1e3 * found.median:.1f}"


def _ratio(name: str, of: str) -> Cell:
    def cell(case: Case, rows: Rows) -> str:
        if name not in rows:
            return ""
        found: Spread | None = getattr(rows[name], of)
        return _problem(rows[name]) if found is None else f"{found.median:.2f}"

    return cell


def _problem(row: Row) -> str:
    problem = row.problem or ""
    return "no memory" if problem.startswith("wants about") else problem


def _peak(name: str) -> Cell:
    def cell(case: Case, rows: Rows) -> str:
        peak = rows[name].peak if name in rows else None
        return "" if peak is None else f"{peak / 1e6:,.0f}"

    return cell


def _tokens_per_second(case: Case, rows: Rows) -> str:
    found = rows[OURS].tokens_per_second if OURS in rows else None
    return "" if found is None else f"{found:,.0f}"


def _share(case: Case, rows: Rows) -> str:
    found = rows[OURS].share if OURS in rows else None
    return "" if found is None else f"{found:.0%}"


def _targets(verdicts: Sequence[Verdict]) -> str:
    """One by one; of other mixtures those that are not behind, the closest, and how many there were."""
    body = []
    peers = [found for found in verdicts if found.limit == 1.0 and found.measured is not None]
    for found in verdicts:
        if found.limit != 1.0 and found.measured is not None:
            body.append(_verdict(found))
    for found in peers:
        if not found.met:
            body.append(_verdict(found))
    ahead = sum(bool(found.met) for found in peers)
    if peers:
        least = min(found.measured for found in peers if found.measured is not None)
        heads = "any other mixture / ours", f"{len(peers)} of them", "at least 1.00"
        body.append((*heads, f"least {least:.2f}", f"met by {ahead}"))
    head = ("target", "case", "limit", "found (quartiles)", "")
    return "\n".join(markdown_table(head, body)) if body else ""


def _verdict(found: Verdict) -> tuple[str, ...]:
    case = found.case
    length = f", {case.tokens:,} tokens" if case.what == "train" else ""
    target, _, *rest = found.cells()
    return target, f"{case.width}, {SHORT[case.dtype]}, E={case.experts}, r={case.rank}{length}", *rest


def latest(files: Sequence[Sequence[Row]]) -> list[Row]:
    """Of several files, each case from the last that has it, in the order in which they came."""
    found: dict[Case, list[Row]] = {}
    for rows in files:
        found |= {case: of_case for case, of_case in by_case(rows)}
    return [row for of_case in found.values() for row in of_case]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.summary",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the same as a picture")
    args = parser.parse_args()
    rows = latest([read_rows(path) for path in args.results])
    print(summary(rows))
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
