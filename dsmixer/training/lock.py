"""One job at a time in a run folder, also on a file system that several machines share.

The lock is a file that says who holds it, and that its holder touches again and again. A holder on this
machine is looked for among the processes; the lock of another machine is watched for a while: if nobody
touches it, its holder is gone. So a job that was killed leaves a lock that holds nobody up for long.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dsmixer.config.errors import UserError

TOUCH_SECONDS = 10.0
WATCH_SECONDS = 45.0
"""How long another machine's lock is watched: several touches, and what a network file system shows late."""
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host, pid: of rank 0.
        machine: of the boot and the space of process numbers: pids of another one say nothing here.
        born: when the process began, by the kernel's clock; a pid may come again.
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
        if self.machine != _machine():
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
    """

    def __init__(self, path: Path, *, watch_seconds: float = WATCH_SECONDS) -> None:
        self.path = path
        self._watch_seconds = watch_seconds
        self._own: Holder | None = None
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
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
        print(
            f"dsmixer: a job on {found.host} (pid {found.pid}) has left a lock, {self.path}; looking for "
            f"{self._watch_seconds:.0f} s whether it is alive",
            file=sys.stderr,
            flush=True,
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
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give the lock back; nothing where this process does not hold it."""
        self._over.set()
        if self._own is not None and _read(self.path) == self._own:
            self.path.unlink(missing_ok=True)
        self._own = None
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
    """Take a dead job's lock away; of several that do, one gets hold of it, and none another one's."""
    aside = path.with_name(f"{path.name}-left-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) != found:  # somebody was faster, and this lock is alive
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    """Who holds a lock, None where there is none; opening it makes a network file system look again."""
    try:
        text = path.read_text(encoding="utf-8")
        if not text:  # its holder is about to write it, or was killed in that moment
            return NOBODY
        given: Any = json.loads(text)
        return Holder(**given)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        fix = "remove it, if no job works in this folder"
        raise UserError("this is not a lock that this version wrote", where=str(path), fix=fix) from error


def _touched(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _held(path: Path, found: Holder) -> UserError:
    return UserError(
        f"another job works in this run folder: pid {found.pid} on {found.host}, since {found.started}",
        where=str(path),
        fix="wait until it has ended, stop it, or choose another run.name",
    )
