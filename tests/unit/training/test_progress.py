"""What a user sees: plain lines or a bar, quiet libraries, tables on rank 0."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from dsmixer.training.progress import Progress, console, print_summary


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run_steps(progress: Progress, clock: Clock, steps: range, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        progress.update(step, loss=1.0 / step, tokens_per_second=12345.6)


def test_plain_lines_come_first_last_and_every_few_seconds_with_the_time_left():
    clock, stream = Clock(), io.StringIO()
    with Progress("stage 1", 20, stream=stream, every_seconds=5, clock=clock) as progress:
        run_steps(progress, clock, range(1, 21), 1.0)
    assert stream.getvalue().splitlines() == [
        "stage 1: step 1/20, loss 1.0000, 12,346 tokens/s, 0:19 left",
        "stage 1: step 6/20, loss 0.1667, 12,346 tokens/s, 0:14 left",
        "stage 1: step 11/20, loss 0.0909, 12,346 tokens/s, 0:09 left",
        "stage 1: step 16/20, loss 0.0625, 12,346 tokens/s, 0:04 left",
        "stage 1: step 20/20, loss 0.0500, 12,346 tokens/s",
    ]


def test_time_left_of_a_resumed_run_counts_only_its_own_steps():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("stage 2", 1000, done=900, stream=stream, clock=clock)
    run_steps(progress, clock, range(901, 902), 60.0)
    assert stream.getvalue().endswith("1:39:00 left\n")


def test_a_terminal_gets_a_bar_with_stage_loss_speed_and_time_left():
    stream = Terminal()
    with Progress("stage 2", 4, stream=stream) as progress:
        for step in range(1, 5):
            progress.update(step, loss=0.25, tokens_per_second=2000.0)
        progress.note("saved step 4")
    text = stream.getvalue()
    assert "\r" in text and "stage 2" in text and "4/4" in text
    assert "loss 0.2500, 2,000 tokens/s" in text and "<" in text
    assert "saved step 4\n" in text


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_are_silent(stream):
    with Progress("stage 1", 3, world_rank=1, stream=stream) as progress:
        progress.update(1, loss=1.0, tokens_per_second=1.0)
        progress.note("news")
    assert stream.getvalue() == ""


def test_summary_table_holds_every_column_and_keeps_brackets():
    stream = io.StringIO()
    rows = [{"stage": "one", "loss": 0.123456, "tokens": 1234567}, {"stage": "[two]", "entropy": 0.5}]
    print_summary(rows, title="Run [x]", file=stream)
    text = stream.getvalue()
    for expected in ("Run [x]", "[two]", "0.1235", "1,234,567", "entropy", "—"):
        assert expected in text


def test_console_writes_on_rank_zero_only(monkeypatch):
    for rank, expected in (("0", "hello\n"), ("3", "")):
        monkeypatch.setenv("RANK", rank)
        stream = io.StringIO()
        console(stream).print("hello")
        assert stream.getvalue() == expected


NOISE = """
import logging, warnings
{before}
import datasets, transformers, deepspeed
{after}
from deepspeed.utils import logger
logger.warning("noise of deepspeed")
transformers.utils.logging.get_logger("transformers.modeling_utils").warning("noise of transformers")
datasets.logging.get_logger("datasets.builder").warning("noise of datasets")
logging.getLogger("torch.distributed").warning("noise of torch")
warnings.warn("noise of python")
logger.error("trouble in deepspeed")
transformers.utils.logging.get_logger("transformers.modeling_utils").error("trouble in transformers")
datasets.logging.get_logger("datasets.builder").error("trouble in datasets")
logging.getLogger("torch.distributed").error("trouble in torch")
print(list(datasets.utils.tqdm(range(2), desc="a bar of datasets")))
"""
QUIET = "from dsmixer.training.progress import quiet_libraries; quiet_libraries()"


def speak(**places: str) -> str:
    """What a process with noisy libraries prints, with ``quiet_libraries`` at a place or nowhere."""
    script = NOISE.format(**{"before": "", "after": "", **places})
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("place", ["before", "after"])
def test_libraries_say_errors_and_nothing_below(place):
    text = speak(**{place: QUIET})
    assert "noise" not in text and "a bar of" not in text
    for library in ("deepspeed", "transformers", "datasets", "torch"):
        assert f"trouble in {library}" in text


def test_a_verbosity_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    text = speak(before=QUIET)
    assert "noise of transformers" in text and "noise of deepspeed" not in text
