"""One job at a time in a run folder, also on a file system that several machines share.

The lock is a file that says who holds it, and that its holder touches again and again. A holder on this
machine is looked for among the processes; the lock of another machine is watched for a while: if nobody
touches it, its holder is gone. So a job that was killed leaves a lock that holds nobody up for long.

A holder that was only frozen, or cut off from the disk, can lose its lock that way. It looks whether it still
has it when it touches it and before it saves or publishes, and writes nothing more where it has not.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dsmixer.checkpoint.atomic import make_folder
from dsmixer.config.errors import UserError
from dsmixer.training.telling import tell_problem

TOUCH_SECONDS = 10.0
WATCH_SECONDS = 45.0
"""How long another machine's lock is watched: several touches, and what a network file system shows late."""
LOOK_SECONDS = 1.0


class LockLostError(RuntimeError):
    """Another job has the run folder now, or the lock was removed: this one may not write there any more."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host, pid: of rank 0.
        machine: of the boot and the space of process numbers: pids of another one say nothing here.
        born: when the process began, by the kernel's clock; a pid may come again. Empty where it can't be
            seen.
        started: when the lock was taken, for people.
        token: of this taking.
    """

    host: str
    pid: int
    machine: str
    born: str
    started: str
    token: str

    def lives(self) -> bool | None:
        """Whether its process is there, and not this one; None where that can't be seen from here."""
        # of a kernel without /proc nothing can be seen: that is no death
        if self.machine != _machine() or not self.born or _born(os.getpid()) is None:
            return None
        if self.pid == os.getpid():
            return False
        return _born(self.pid) == self.born


NOBODY = Holder("an unknown host", 0, "", "", "", "")


def _this_process() -> Holder:
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        born=_born(os.getpid()) or "",
        started=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        token=uuid.uuid4().hex,
    )


def _machine() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> str | None:
    """When a process began; None where there is none, or it is dead and only waits for its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class RunLock:
    """The lock of a run folder. On rank 0.

    Args:
        path: of the lock, in the run folder.
        watch_seconds: how long a lock of another machine is watched before it counts as left behind.

    Attributes:
        when_lost: called once, from another thread, when the lock is found to be lost.
    """

    def __init__(self, path: Path, *, watch_seconds: float = WATCH_SECONDS) -> None:
        self.path = path
        self.when_lost: Callable[[], None] = lambda: None
        self._watch_seconds = watch_seconds
        self._own: Holder | None = None
        self._loss: str | None = None
        self._over = threading.Event()

    def take(self) -> None:
        """Make the folder and take its lock, or one that a dead job has left; nothing where this has it.

        Raises:
            UserError: another job holds it.
            OSError: it can't be written.
        """
        if self._own is not None:
            return
        own = _this_process()
        make_folder(self.path.parent)
        while not _create(self.path, own):
            self._make_room()
        self._own = own
        atexit.register(self.release)
        threading.Thread(target=self._touch, name="dsmixer-lock", daemon=True).start()

    def _make_room(self) -> None:
        """Remove the lock that is there, if its holder is gone."""
        found = _read(self.path)
        if found is None:
            return  # released in the meantime
        lives = found.lives()
        if lives is None:
            lives = self._is_touched(found)
        if lives:
            raise _held(self.path, found)
        _remove(self.path, found)

    def _is_touched(self, found: Holder) -> bool:
        tell_problem(
            f"a job on {found.host} (pid {found.pid}) has left a lock, {self.path}; looking for "
            f"{self._watch_seconds:.0f} s whether it is alive"
        )
        before = _touched(self.path)
        until = time.monotonic() + self._watch_seconds
        while time.monotonic() < until:
            time.sleep(min(LOOK_SECONDS, self._watch_seconds))
            if _touched(self.path) != before:
                return _read(self.path) is not None
        return False

    def _touch(self) -> None:
        while not self._over.wait(TOUCH_SECONDS):
            if self.loss() is not None:
                self.when_lost()
                return
            with suppress(OSError):
                os.utime(self.path)

    @property
    def lost(self) -> bool:
        """Whether it was found to be lost; asks no disk."""
        return self._loss is not None

    def loss(self) -> str | None:
        """Look who holds the lock: None where it is this job, or it was not taken; else what has happened.

        A lock that was lost once stays lost. Where the disk can't be read that is not known, and None.
        """
        own = self._own
        if own is not None and self._loss is None:
            with suppress(OSError):
                found = _there(self.path)
                if found != own and self._own is own:  # it may be given back meanwhile
                    self._loss = _told_loss(self.path, found)
        return self._loss

    def release(self) -> None:
        """Give the lock back; nothing where this process does not hold it."""
        self._over.set()
        own, self._own = self._own, None
        if own is not None:
            with suppress(OSError):  # left behind, it will be found to be a dead job's
                _remove(self.path, own)
        atexit.unregister(self.release)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _create(path: Path, own: Holder) -> bool:
    """Whether the file is now this job's; not where there is one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(own)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def _remove(path: Path, found: Holder) -> None:
    """Take away the lock of a job that is dead or ends, and none that has come in its place.

    Whoever removes one holds the kernel's lock on that very file, so that nobody can put another in its place
    between the look and the removal. On a file system without such locks that moment stays; whose lock is
    lost in it finds that out.
    """
    with suppress(FileNotFoundError), _opened(path) as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()) and _there(path) == found:
            path.unlink()


def _read(path: Path) -> Holder | None:
    """Who holds a lock, None where there is none; opening it makes a network file system look again."""
    try:
        text = path.read_text(encoding="utf-8")
        if _is_half(text):
            return NOBODY
        given: Any = json.loads(text)
        return Holder(**given)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        fix = "remove it, if no job works in this folder"
        raise UserError("this is not a lock that this version wrote", where=str(path), fix=fix) from error


def _is_half(text: str) -> bool:
    """Whether a lock has no end: its holder is about to write it, was killed then, or had no power any more,
    after which a disk may also hold zeros."""
    there = text.strip(" \n\0")
    return not there or (there.startswith("{") and not there.endswith("}"))


def _opened(path: Path) -> BinaryIO:
    """For writing too where that is allowed: network file systems lock no other file for one alone."""
    try:
        return path.open("rb+")
    except PermissionError:
        return path.open("rb")


def _there(path: Path) -> Holder | None:
    """``_read``, where a file of another kind is somebody's whom nobody knows."""
    try:
        return _read(path)
    except UserError:
        return NOBODY


def _touched(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _told_loss(path: Path, found: Holder | None) -> str:
    now = "was removed, and another job may take the run folder at any time"
    if found is not None:
        now = f"is another job's now, which works in the run folder: {_name(found)}"
    return (
        f"{path}: the lock of this job {now}. This one stops and writes nothing more there; what it had "
        "saved is whole"
    )


def _name(holder: Holder) -> str:
    if holder == NOBODY:
        return "one that has not written its name"
    return f"pid {holder.pid} on {holder.host}, since {holder.started}"


def _held(path: Path, found: Holder) -> UserError:
    return UserError(
        f"another job works in this run folder: {_name(found)}",
        where=str(path),
        fix="wait until it has ended, stop it, or choose another run.name",
    )
