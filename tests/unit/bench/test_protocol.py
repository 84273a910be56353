"""A process that is asked line by line: answers, last words, time limits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench.protocol import Remote, RemoteError

ECHO = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("die"):
        sys.exit(asked["die"])
    if asked.get("wait"):
        continue
    print(json.dumps({"got": asked}), flush=True)
"""


def _remote(tmp_path: Path, code: str) -> Remote:
    return Remote([sys.executable, "-c", code], tmp_path / "log")


def test_it_answers_in_order_and_ends_when_nobody_asks_any_more(tmp_path: Path) -> None:
    remote = _remote(tmp_path, ECHO)
    assert remote.ask(20, do="one", text="ü\n")["got"] == {"do": "one", "text": "ü\n"}
    assert remote.ask(20, do="two")["got"] == {"do": "two"}
    remote.close()
    assert remote._process.returncode == 0


def test_a_process_that_breaks_down_leaves_its_last_words(tmp_path: Path) -> None:
    remote = _remote(tmp_path, ECHO)
    with pytest.raises(RemoteError, match="no room left for tensors"):
        remote.ask(20, do="x", die="no room left for tensors")
    with pytest.raises(RemoteError):
        remote.ask(20, do="x")
    remote.close()


def test_a_process_that_was_killed_is_told_by_its_signal(tmp_path: Path) -> None:
    remote = _remote(tmp_path, "import os, signal; input(); os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RemoteError, match="SIGKILL"):
        remote.ask(20, do="x")
    remote.close()


def test_a_process_that_does_not_answer_in_time_is_ended(tmp_path: Path) -> None:
    remote = _remote(tmp_path, ECHO)
    remote.ask(20, do="x")
    with pytest.raises(RemoteError, match="no answer within 0 s"):
        remote.ask(0.1, do="x", wait=True)
    assert remote._process.returncode is not None
    remote.close()
