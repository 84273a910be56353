"""The lock on a run folder, with real processes for its holders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from dsmixer.config.errors import UserError
from dsmixer.training import lock as lock_module
from dsmixer.training.lock import RunLock, _this_process

HOLD = """
import sys
from pathlib import Path
from dsmixer.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("taken", flush=True)
sys.stdin.readline()
"""


def holding(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until a line comes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def from_elsewhere(path: Path) -> None:
    """A lock that another machine has left."""
    there = {**asdict(_this_process()), "host": "node-x", "machine": "another one"}
    path.write_text(json.dumps(there))


def test_a_lock_is_taken_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "mine" / ".lock"
    with RunLock(path) as lock:
        lock.take()
        lock.take()
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_second_job_is_told_who_works_there(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder = holding(path)
    text = path.read_text()
    with pytest.raises(UserError, match=f"another job works in this run folder: pid {holder.pid} on "):
        RunLock(path).take()
    assert path.read_text() == text
    holder.communicate("\n")
    assert not path.exists(), "a process that ends by itself gives it back"


def test_the_lock_of_a_killed_job_is_free_at_once(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder = holding(path)
    holder.kill()
    holder.communicate()
    assert path.exists()
    with RunLock(path) as lock:
        lock.take()


def test_a_pid_that_has_come_again_holds_nothing(tmp_path: Path) -> None:
    """Process 1 lives, and began at another time."""
    path = tmp_path / ".lock"
    path.write_text(json.dumps({**asdict(_this_process()), "pid": 1, "born": "another time"}))
    with RunLock(path) as lock:
        lock.take()


@pytest.mark.parametrize("text", [None, ""])
def test_what_nobody_touches_on_another_machine_is_taken(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a lock whose holder was killed before it wrote its name."""
    path = tmp_path / ".lock"
    from_elsewhere(path)
    if text is not None:
        path.write_text(text)
    with RunLock(path, watch_seconds=0.01) as lock:
        lock.take()
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "has left a lock" in capsys.readouterr().err


def test_what_is_touched_on_another_machine_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    from_elsewhere(path)
    monkeypatch.setattr(lock_module, "LOOK_SECONDS", 0.01)
    over = threading.Event()

    def touch() -> None:
        number = 0
        while not over.wait(0.001):
            number += 1
            os.utime(path, ns=(number, number))

    other = threading.Thread(target=touch)
    other.start()
    try:
        with pytest.raises(UserError, match="pid .* on node-x"):
            RunLock(path, watch_seconds=60).take()
    finally:
        over.set()
        other.join()


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    path.write_text(json.dumps({**asdict(_this_process()), "pid": dead.pid, "born": "then"}))
    dead.wait()
    code = HOLD.replace("lock.take()", "\ntry:\n    lock.take()\nexcept ValueError:\n    sys.exit(2)")
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    said = []
    for process in others:
        assert process.stdout is not None
        said.append(process.stdout.readline())
    for process in others:
        process.communicate("\n")
    assert sorted(said) == ["", "", "", "taken\n"] and [p.returncode for p in others].count(2) == 3


def test_a_file_of_another_kind_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("mine")
    with pytest.raises(UserError, match="not a lock that this version wrote"):
        RunLock(path).take()
    assert path.read_text() == "mine"
