"""Which cases are measured, and who stands beside whom in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench.__main__ import parse
from tests.bench.case import Case
from tests.bench.grid import cases
from tests.bench.running import groups, takes_part
from tests.bench.systems.registry import DEFAULT, bytes_wanted

CASE = Case("train", width=1024, layers=2, experts=64, rank=64, sequence=512)


def test_the_chosen_cases_hold_every_target_and_every_number_of_experts() -> None:
    chosen, quick = cases(parse([])), cases(parse(["--quick"]))
    every = {6, 16, 64, 196, 512}
    for found in (chosen, quick):
        training = {(c.width, c.dtype, c.experts, c.rank) for c in found if c.what == "train"}
        for dtype in ("float32", "bfloat16"):
            assert {(2048, dtype, 6, 64), (2048, dtype, 196, 16), (1024, dtype, 6, 64)} <= training
        assert {c.experts for c in found if c.what == "train"} == every
        assert {6, 64, 196} <= {c.experts for c in found if c.what == "decode"}
    assert {c.experts for c in chosen if c.what == "decode"} == every
    lengths = {c.sequence for c in chosen if c.what == "train"}
    assert min(lengths) == 128 and max(lengths) == 4096


def test_what_is_given_is_crossed_and_the_rest_is_whole() -> None:
    asked = ["--what", "train", "--experts", "6", "64", "--ranks", "16", "--sequence", "128"]
    found = cases(parse([*asked, "--widths", "1024"]))
    assert {(c.experts, c.rank, c.sequence, c.width, c.what) for c in found} == {
        (e, 16, 128, 1024, "train") for e in (6, 64)
    }
    assert {c.dtype for c in found} == {"float32", "bfloat16"}
    # decoding has a prompt and no length of a row
    assert len(cases(parse(["--full"]))) == 5 * 2 * 2 * 2 * (4 + 1)


def test_mola_is_left_out_without_its_interpreter_and_refused_if_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "mola" not in parse([]).systems
    assert "mola" in parse(["--moe-peft-python", "python"]).systems
    with pytest.raises(SystemExit):
        parse(["--systems", "mola"])
    assert "--moe-peft-python" in capsys.readouterr().err


def test_systems_that_do_not_fit_together_are_measured_apart_each_with_the_references() -> None:
    names = ["base", "lora", "x_lora", "loop", "stage_two"]
    want = {name: bytes_wanted(name, CASE) for name in names}
    always = ["base", "lora", "stage_two"]
    room = sum(want[name] for name in always) + want["x_lora"]
    assert want["loop"] < want["x_lora"]
    everything = sum(want.values())
    assert groups(names, CASE, everything) == [[*always, "x_lora", "loop"]]
    found = groups(names, CASE, room)
    assert found == [[*always, "x_lora"], [*always, "loop"]]
    for group in found:
        assert sum(want[name] for name in group) <= room


def test_a_system_that_fits_nowhere_is_in_no_group() -> None:
    names = ["base", "lora", "x_lora", "loop"]
    assert bytes_wanted("x_lora", CASE) > bytes_wanted("loop", CASE)
    room = sum(bytes_wanted(name, CASE) for name in ("base", "lora", "loop"))
    assert groups(names, CASE, room) == [["base", "lora", "loop"]]
    assert groups(names, CASE, 0.0) == []


def test_lines_without_a_meaning_are_not_measured() -> None:
    decode, half = replace(CASE, what="decode"), replace(CASE, dtype="bfloat16")
    assert "stage_one" not in [name for name in DEFAULT if takes_part(name, decode)]
    assert not takes_part("lora_without_autocast", CASE) and takes_part("lora_without_autocast", half)
