"""Targets, tables, the file and the plot, from rows made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.case import Case
from tests.bench.results import Row, cells, markdown, plot, read_rows, write
from tests.bench.targets import Verdict, check
from tests.bench.timing import Spread

CASE = Case("train", width=2048, layers=2, experts=6, rank=64)


def _row(
    system: str, ratio: float, case: Case = CASE, to_base: float = 1.0, to_ours: Spread | None = None
) -> Row:
    return Row(
        case,
        system,
        seconds=Spread(0.25 * ratio, 0.2 * ratio, 0.3 * ratio, 7),
        to_lora=Spread(ratio, 0.99 * ratio, 1.01 * ratio, 7),
        to_base=Spread(to_base, to_base, to_base, 7),
        to_ours=to_ours,
        peak=2_500_000_000,
        trained=1,
        loss=1.0,
        gradient_norm=1.0,
        tokens_per_second=4096.0,
        share=0.5,
        matmul=1e11,
    )


def _found(*rows: Row) -> dict[str, Verdict]:
    return {verdict.target: verdict for verdict in check(rows)}


@pytest.mark.parametrize(
    ("experts", "rank", "limit"), [(6, 64, 1.10), (196, 16, 1.15), (6, 16, None), (64, 64, None)]
)
def test_the_limit_of_stage_two_is_that_of_its_pool(experts: int, rank: int, limit: float | None) -> None:
    case = replace(CASE, experts=experts, rank=rank)
    under, over = (_found(_row("stage_two", (limit or 1.1) + d, case)) for d in (-0.001, 0.001))
    if limit is None:
        assert "stage two / PEFT LoRA" not in under
    else:
        assert under["stage two / PEFT LoRA"].met is True
        assert over["stage two / PEFT LoRA"].met is False
        assert over["stage two / PEFT LoRA"].limit == limit


def test_stage_one_is_promised_from_width_2048_on() -> None:
    assert _found(_row("stage_one", 1.05))["stage one / PEFT LoRA"].met is True
    narrow = _found(_row("stage_one", 1.06, replace(CASE, width=1024)))["stage one / PEFT LoRA"]
    assert narrow.met is False and not narrow.promised
    assert narrow.cells()[-1] == "missed; not promised"


def test_decoding_is_held_against_the_base_and_not_against_lora() -> None:
    case = replace(CASE, what="decode")
    assert _found(_row("stage_two", 0.9, case, to_base=1.16))["decoding / frozen base"].met is False
    assert _found(_row("stage_two", 3.0, case, to_base=1.15))["decoding / frozen base"].met is True


def test_peers_have_to_take_longer_and_two_of_them_three_times_at_64_experts() -> None:
    case = replace(CASE, experts=64)
    times = {"mola": 2.9, "x_lora": 3.1, "loop": 1.02, "arrow": 0.98}
    peers = [_row(name, 9.0, case, to_ours=Spread(by, by - 0.01, by + 0.01, 7)) for name, by in times.items()]
    found = _found(_row("stage_two", 1.2, case), *peers)
    assert found["MoE-PEFT MoLA / ours"].measured == 2.9
    assert found["MoE-PEFT MoLA / ours"].met is False and found["PEFT X-LoRA / ours"].met is True
    assert found["plain loop / ours"].met is True and found["PEFT Arrow / ours"].met is False
    fewer = _found(*(replace(row, case=CASE) for row in [_row("stage_two", 1.2), *peers]))
    assert fewer["MoE-PEFT MoLA / ours"].met is True


def test_a_peer_that_took_longer_in_some_rounds_alone_is_not_behind() -> None:
    peer = _row("arrow", 1.0, to_ours=Spread(1.1, 0.99, 1.3, 7))
    assert _found(_row("stage_two", 1.0), peer)["PEFT Arrow / ours"].met is False
    alone = _found(_row("stage_two", 1.0), _row("arrow", 1.0))["PEFT Arrow / ours"]
    assert alone.met is None and "was not measured beside it" in alone.cells()[-1]


def test_a_peer_without_figures_is_not_measured_and_the_reason_is_told() -> None:
    found = _found(_row("stage_two", 1.0), Row(CASE, "arrow", problem="wants about 90 GB, 10 are free"))
    verdict = found["PEFT Arrow / ours"]
    assert verdict.met is None and "wants about 90 GB" in verdict.cells()[-1]


def test_a_row_of_the_table() -> None:
    found = cells(_row("stage_two", 1.2, to_base=1.5))
    assert found == (
        "ours, stage two",
        "300.00",
        "1.200",
        "1.188 to 1.212",
        "1.500",
        "2.500",
        "4,096",
        "50.0%",
    )
    assert cells(_row("stage_two", 1.2, replace(CASE, what="decode")))[0] == "ours"
    assert cells(Row(CASE, "arrow", problem="no memory"))[-1] == "no memory"


def test_what_is_written_is_read_again_and_told_as_tables(tmp_path: Path) -> None:
    rows = [_row("lora", 1.0), _row("stage_two", 1.2), Row(CASE, "arrow", problem="no memory")]
    write(tmp_path / "results.json", {"cores": 2}, rows, check(rows))
    assert read_rows(tmp_path / "results.json") == rows
    text = markdown(rows, check(rows))
    assert "| PEFT LoRA | 250.00 | 1.000 |" in text
    assert "at most 1.10 | 1.200 (1.188 to 1.212) | missed |" in text


def test_the_plot_has_a_line_for_each_system_that_was_measured(tmp_path: Path) -> None:
    rows = [_row(name, 1.1, replace(CASE, experts=e)) for e in (6, 64) for name in ("lora", "stage_two")]
    assert plot(rows, tmp_path / "ratios.svg")
    drawn = (tmp_path / "ratios.svg").read_text(encoding="utf-8")
    assert "PEFT LoRA" in drawn and "ours, stage two" in drawn and "plain loop" not in drawn
    assert not plot([Row(CASE, "arrow", problem="no memory")], tmp_path / "none.svg")
