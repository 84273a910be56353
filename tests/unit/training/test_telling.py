"""Lines for people on devices that take none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsmixer.training.progress import Progress
from dsmixer.training.telling import tell

FULL = Path("/dev/full")

SPEAKS = """
import sys
from rich.table import Table
from dsmixer.cli.main import guarded
from dsmixer.training.progress import console, print_summary
from dsmixer.training.telling import let_go, lossy, tell, tell_problem
def work():
    for _ in range(2000):
        tell("a line of a run")
        tell_problem("warning: one more")
    print_summary([{"step": 1}], file=lossy(sys.stdout))
    let_go(sys.stdout)
    return 75
sys.exit(guarded(work))
"""


def test_a_full_device_takes_no_line_and_changes_no_exit_code() -> None:
    with FULL.open("w") as full:
        ended = subprocess.run([sys.executable, "-c", SPEAKS], stdout=full, stderr=full, check=False)
    assert ended.returncode == 75


def test_a_reader_that_is_gone_changes_no_exit_code() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SPEAKS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 75


def test_a_bar_and_a_line_go_on_where_nothing_can_be_written() -> None:
    stream = FULL.open("w")
    with Progress("stage 1", 2, stream=stream) as progress:
        progress.update(1, loss=1.0, tokens_per_second=1.0)
        progress.note("a note")
    tell("a line", stream)
    with pytest.raises(OSError, match="No space left"):
        stream.close()
    tell("closed", stream)


def test_a_line_comes_as_it_is(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        tell("a line", log)
        assert (tmp_path / "log").read_text() == "a line\n"
