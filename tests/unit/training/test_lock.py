"""The lock on a run folder, with real processes for its holders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from dsmixer.config.errors import UserError
from dsmixer.training import lock as lock_module
from dsmixer.training.lock import LockLostError, RunLock, _remove, _this_process
from dsmixer.training.together import keep_lock
from dsmixer.training.world import World

ALONE = World(0, 1, torch.device("cpu"))

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


@pytest.mark.parametrize(
    "text", [None, "", "\0" * 200, '{"host": "node-x", "pi', '{"host": "node' + "\0" * 9]
)
def test_what_nobody_touches_on_another_machine_is_taken(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a lock whose holder was killed before it wrote its name, or that a power cut has left half."""
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


def test_a_holder_that_can_not_be_seen_is_not_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel shows no processes, or did not show the holder its own beginning."""
    there = replace(_this_process(), pid=1, born="then")
    assert there.lives() is False
    assert replace(there, born="").lives() is None
    monkeypatch.setattr(lock_module, "_born", lambda pid: None)
    assert there.lives() is None


def test_a_lock_that_came_in_the_place_of_a_dead_one_is_not_moved_for_a_moment(tmp_path: Path) -> None:
    """Its holder, or a third job, would look just then."""
    path = tmp_path / ".lock"
    holder = holding(path)
    before = path.stat()
    _remove(path, replace(_this_process(), pid=1, born="then"))
    after = path.stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
    holder.communicate("\n")
    assert not path.exists()


def taken_away(path: Path, how: str) -> str:
    """The lock removed, or taken by a job elsewhere; its text afterwards."""
    path.unlink()
    if how == "taken":
        from_elsewhere(path)
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(("how", "told"), [("removed", "was removed"), ("taken", "pid .* on node-x, since")])
def test_a_lost_lock_stops_the_job_before_it_writes_and_is_not_given_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, told: str
) -> None:
    path = tmp_path / ".lock"
    with RunLock(path) as lock:
        keep_lock(ALONE, lock)  # a new run has not taken it yet
        lock.take()
        keep_lock(ALONE, lock)
        assert not lock.lost and capsys.readouterr().err == ""
        text = taken_away(path, how)
        with pytest.raises(LockLostError, match=told):
            keep_lock(ALONE, lock)
        assert lock.lost and capsys.readouterr().err.startswith(f"dsmixer: error: {path}: ")
        if how == "removed":
            from_elsewhere(path)
            text = path.read_text()
    assert path.read_text() == text, "the other one's stays"


def test_a_job_between_two_saves_is_told_that_its_lock_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "TOUCH_SECONDS", 0.01)
    told = threading.Event()
    with RunLock(tmp_path / ".lock") as lock:
        lock.when_lost = told.set
        lock.take()
        before = lock.path.stat().st_mtime_ns
        while lock.path.stat().st_mtime_ns == before:
            pass  # it is still touched
        assert not told.is_set()
        taken_away(lock.path, "taken")
        assert told.wait(60)
        assert lock.lost
