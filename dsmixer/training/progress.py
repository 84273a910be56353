"""What a user sees while a run goes on: one bar, or a line now and then, and tables at the end."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from dsmixer.data.parallel import SERIAL, VARIABLE
from dsmixer.report.text import duration, readable
from dsmixer.training.telling import lossy, tell

NOISY_LOGGERS = (
    "DeepSpeed",
    "transformers",
    "datasets",
    "torch",
    "torch.distributed",
    "accelerate",
    "peft",
    "bitsandbytes",
)
QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    VARIABLE: SERIAL,  # of tokenizers
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "KINETO_LOG_LEVEL": "6",  # errors alone: what a trace says of its start is level 5
}
LOG_WIDTH = 140  # columns of a table where no terminal says how many there are
BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def world_rank() -> int:
    """The rank of this process: of the process group, of the launcher's environment, or 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def console(file: TextIO | None = None) -> Console:
    """A rich console that writes on rank 0 and swallows everything on the others.

    Args:
        file: where to; standard output if None.
    """
    stream = sys.stdout if file is None else file
    width = None if stream.isatty() or "COLUMNS" in os.environ else LOG_WIDTH
    return Console(file=stream, quiet=world_rank() != 0, highlight=False, width=width)


def quiet_libraries() -> None:
    """Silence what the libraries underneath say below an error, on this rank.

    Best called before they are imported, and again after: some set their levels when they are. A level that
    the user put into the environment (such as ``TRANSFORMERS_VERBOSITY=info``) stays.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    spoken_for = {
        "transformers": os.environ["TRANSFORMERS_VERBOSITY"] != "error",
        "datasets": os.environ["DATASETS_VERBOSITY"] != "error",
    }
    for name in NOISY_LOGGERS:
        if not spoken_for.get(name, False):
            logger = logging.getLogger(name)
            logger.setLevel(logging.ERROR)
            if _only_errors not in logger.filters:
                logger.addFilter(_only_errors)  # DeepSpeed sets its level anew when it is imported
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    _quiet_bars()


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _quiet_bars() -> None:
    if "datasets" in sys.modules and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1":
        sys.modules["datasets"].disable_progress_bars()
    if "transformers" in sys.modules and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1":
        sys.modules["transformers"].utils.logging.disable_progress_bar()


class Progress:
    """The progress of one stage on rank 0: a bar on a terminal, plain lines elsewhere.

    Plain lines come at most every ``every_seconds``, and for the first and the last step. Other ranks are
    silent.

    Args:
        label: such as ``stage 1``.
        num_steps: optimizer steps of the stage.
        done: steps done before, in a resumed run.
        world_rank: of this process.
        stream: standard error if None.
        every_seconds: between two plain lines.
        clock: seconds, from any origin.
    """

    def __init__(
        self,
        label: str,
        num_steps: int,
        *,
        done: int = 0,
        world_rank: int = 0,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.num_steps, self.done = label, num_steps, done
        self._stream = lossy(sys.stderr if stream is None else stream)
        self._enabled = world_rank == 0
        self._every_seconds, self._clock = every_seconds, clock
        self._begun, self._begun_at, self._said_at = done, clock(), -float("inf")
        self._bar: tqdm | None = None
        if self._enabled and self._stream.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=done,
                desc=label,
                file=self._stream,
                bar_format=BAR_FORMAT,
                dynamic_ncols=True,
            )

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Say that ``step`` (from 1) is done.

        Args:
            step: of this stage.
            loss: nats a target token.
            tokens_per_second: over all ranks.
        """
        if not self._enabled:
            return
        news = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(news, refresh=False)
            self._bar.update(step - self.done)
        self.done = step
        now = self._clock()
        first_or_last = step in (self._begun + 1, self.num_steps)
        if self._bar is None and (first_or_last or now - self._said_at >= self._every_seconds):
            self._said_at = now
            self._say(f"{self.label}: step {step}/{self.num_steps}, {news}{self._time_left(now)}")

    def note(self, text: str) -> None:
        """A line of its own, which leaves the bar whole."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            self._say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _say(self, text: str) -> None:
        tell(text, self._stream)

    def _time_left(self, now: float) -> str:
        steps = self.done - self._begun
        if self.done >= self.num_steps or steps <= 0:
            return ""
        seconds = (now - self._begun_at) / steps * (self.num_steps - self.done)
        return f", {duration(seconds)} left"


def print_summary(
    rows: Sequence[Mapping[str, object]], *, title: str | None = None, file: TextIO | None = None
) -> None:
    """Print rows as one table, on rank 0 alone.

    Args:
        rows: mappings from column to value; a column that a row lacks is a dash.
        title: above the table.
        file: standard output if None.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(title=None if title is None else Text(title), title_justify="left", header_style="bold")
    for column in columns:
        is_number = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(Text(column), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(Text(readable(row.get(column))) for column in columns))
    console(file).print(table)
