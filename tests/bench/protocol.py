"""A system in a process of its own: one line of JSON asks, one line answers.

A process that breaks down says nothing more; the one that leads finds its last words in its log, and starts
it anew for the next case. So nothing that one system does ends the bench, not even being killed for its
memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAST_WORDS = 300
"""Characters of a log that are shown."""


class RemoteError(Exception):
    """The process has ended, or did not answer in time."""


class Remote:
    """One process, waiting for its turn.

    Args:
        command: what starts it.
        log: file that its standard error is appended to.
        environment: added to this process's own.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(environment or {})},
            )
        self._left = b""

    def ask(self, limit: float, **message: Any) -> dict[str, Any]:
        """Send a message and wait for the answer.

        Args:
            limit: seconds.
            message: JSON values.

        Raises:
            RemoteError: no answer; the process is gone then.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RemoteError(self._last_words()) from error
        answer: dict[str, Any] = json.loads(self._line(limit))
        return answer

    def _line(self, limit: float) -> bytes:
        assert self._process.stdout is not None
        until = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._left:
                if not selector.select(max(0.0, until - time.monotonic())):
                    self._process.kill()
                    self._process.wait()
                    raise RemoteError(f"no answer within {limit:.0f} s")
                read = os.read(self._process.stdout.fileno(), 65536)
                if not read:
                    raise RemoteError(self._last_words())
                self._left += read
        line, _, self._left = self._left.partition(b"\n")
        return line

    def _last_words(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        written = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return (written[-1] if written else f"ended with code {code}")[:LAST_WORDS]

    def hang_up(self) -> None:
        """Nothing more will be asked: the process ends by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self) -> None:
        """End the process, if it has not ended."""
        self.hang_up()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
