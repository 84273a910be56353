"""``dsmixer compare`` where nothing has to be trained: its list, its arguments, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsmixer.cli.main import main

File = Callable[..., Path]


def listed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["compare", *map(str, arguments), "--list", "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_list_has_every_cell_and_writes_nothing(
    comparison_file: File, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = listed(capsys, comparison_file())
    assert found["folder"] == str(tmp_path / "runs" / "losses")
    assert [cell["state"] for cell in found["cells"]] == ["not begun"] * 10
    assert [(cell["row"], cell["seed"]) for cell in found["cells"][1:3]] == [("RSL", 0), ("GMoE", 0)]
    assert not (tmp_path / "runs").exists()


def test_overrides_may_stand_before_and_behind_flags(
    comparison_file: File, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = comparison_file()
    for arguments in (
        (path, "run.name=again", "--seeds", "3", "--only", "RSL"),
        (path, "--only", "RSL", "run.name=again", "--seeds", "3"),
        (path, "--seeds", "3", "--only", "RSL", "--jobs", "2", "run.name=again"),
    ):
        found = listed(capsys, *arguments)
        assert found["folder"] == str(tmp_path / "runs" / "again")
        assert [(cell["row"], cell["seed"]) for cell in found["cells"]][1] == ("RSL", 3)
        assert len(found["cells"]) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scale", "smal"], "no scale is called 'smal'"),
        (["--only", "rsl"], "no variant is called 'rsl'"),
        (["--seeds", "a"], "comparison.seeds"),
        (["--table"], "there is nothing to make a table of"),
        (["stage2.top_k=9"], "variant 'RSL': 9 experts a token, of 2 experts"),
        (["comparison.methods=[unifrom]"], "there is no method 'unifrom'"),
        (["comparison.method_settings={uniform: {a: 1}}"], "there is no such setting"),
    ],
)
def test_a_mistake_ends_with_two_before_anything_is_written(
    comparison_file: File,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    assert main(["compare", str(comparison_file()), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
