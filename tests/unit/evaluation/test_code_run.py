"""Generated programs that go wrong in every way: each is stopped, told, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import select
import socket
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dsmixer.config.errors import RunError
from dsmixer.evaluation import code_run
from dsmixer.evaluation.code_run import MIB, PASSED, Limits, run_program

SHORT = Limits(seconds=20, cpu_seconds=1)

WRONG = {
    "a failed assertion": ("assert 1 + 1 == 3, 'sums'", "AssertionError: sums"),
    "no Python": ("def f(:", "SyntaxError"),
    "a loop": ("while True: pass", "out of CPU time"),
    "a loop that will not be told": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "ended by signal 9",
    ),
    "a fork": ("import os\nos.fork()", "BlockingIOError"),
    "forks without end": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "out of CPU time",
    ),
    "another program": ("import subprocess\nsubprocess.run(['true'])", "BlockingIOError"),
    "a thread": ("import threading\nthreading.Thread(target=print).start()", "RuntimeError: can't start"),
    "memory at once": ("x = bytearray(1 << 33)", "MemoryError"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 24))", "MemoryError"),
    "a big file": ("open('big', 'wb').write(bytes(1 << 25))", "OSError: [Errno 27]"),
    "many open files": ("x = [open('f', 'w') for _ in range(1000)]", "OSError: [Errno 24]"),
    "a recursion": ("def f(): return f()\nf()", "RecursionError"),
    "standard input": ("input()", "EOFError"),
    "a crash": ("import ctypes\nctypes.string_at(0)", "ended by signal 11"),
    "leaving early": ("import sys\nsys.exit(0)\nassert False", "SystemExit: 0"),
    "leaving hard": ("import os\nos._exit(0)\nassert False", "left before its end, with exit code 0"),
    "ending itself": ("import os\nos.kill(os.getpid(), 9)", "ended by signal 9"),
    "ending its group": ("import os\nos.killpg(0, 9)", "ended by signal 9"),
    "a report of its own": (
        'import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b\'{"token": "x"}\\n[1]\\n\')\n'
        "    except OSError:\n        pass\nos._exit(0)",
        "left before its end",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_program_that_goes_wrong_is_ended_and_told(name: str) -> None:
    program, verdict = WRONG[name]
    # a machine that is busy takes more than a second to hand out all the memory that is allowed
    limits = replace(SHORT, seconds=60, cpu_seconds=20) if verdict == "MemoryError" else SHORT
    outcome = run_program(program, limits)
    if not outcome.processes_forbidden and "Error" in verdict and ("fork" in program or "thread" in program):
        pytest.skip("nothing here keeps a program from starting processes")
    assert outcome.verdict.startswith(verdict) and outcome.seconds < limits.seconds


def test_a_program_passes_by_coming_to_its_end() -> None:
    outcome = run_program("print('seen')\nassert sorted([2, 1]) == [1, 2]")
    assert outcome.verdict == PASSED and outcome.output == "seen\n"


def test_a_program_that_waits_is_ended_by_the_clock() -> None:
    outcome = run_program("import time\nprint('up', flush=True)\ntime.sleep(60)", Limits(seconds=1.5))
    assert outcome.verdict == "out of time" and outcome.output == "up\n" and outcome.seconds < 20


def test_of_endless_printing_the_beginning_is_kept() -> None:
    outcome = run_program("while True: print('x' * 99)", Limits(cpu_seconds=1, output=1000))
    assert outcome.verdict == "out of CPU time" and outcome.output == ("x" * 99 + "\n") * 10


def test_it_sees_neither_the_environment_nor_files_and_its_folder_is_gone_afterwards(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = "import os\nprint(sorted(os.environ), os.listdir(), os.getcwd())\nopen('left', 'w').write('x')"
    outcome = run_program(program)
    names, files, folder = outcome.output.replace("'LC_CTYPE'", "").split()  # which Python itself sets
    assert (outcome.verdict, names, files) == (PASSED, "[]", "[]") and not Path(folder).exists()


def test_it_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        outcome = run_program(f"import socket\nsocket.create_connection({place!r}, timeout=5)")
    if not outcome.network_isolated:
        assert outcome.verdict == PASSED, "told as open, and is"
        pytest.skip("the kernel lets no process into a network of its own here")
    assert outcome.verdict.startswith("OSError")


def test_children_left_behind_end_with_it_though_they_hold_its_output() -> None:
    program = (
        "import os, time\nhear, say = os.pipe()\nif os.fork() == 0:\n    print(os.getpid(), flush=True)\n"
        "    os.write(say, b'x')\n    time.sleep(600)\nos.read(hear, 1)"
    )
    outcome = run_program(program, Limits(new_processes=True))
    assert outcome.verdict == PASSED and outcome.seconds < 20 and not outcome.processes_forbidden
    try:
        child = os.pidfd_open(int(outcome.output))
    except ProcessLookupError:
        return
    try:
        assert select.select([child], [], [], 20)[0], "the child has ended"
    finally:
        os.close(child)


def test_a_limit_of_the_memory_is_the_programs_and_can_be_raised() -> None:
    program = "x = bytearray(700 << 20)"
    assert run_program(program, Limits(memory=512 * MIB)).verdict == "MemoryError: "
    assert run_program(program, Limits(memory=2048 * MIB)).verdict == PASSED


def test_a_machine_that_can_not_start_the_process_is_not_the_programs_fault(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(code_run, "RUNNER", tmp_path / "missing.py")
    with pytest.raises(RunError, match="ended before it began"):
        run_program("pass")


def test_a_kernel_that_can_not_tell_when_a_process_ends_is_no_hindrance(monkeypatch) -> None:
    """``pidfd_open`` came with Linux 5.3."""

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert run_program("pass").verdict == PASSED


def test_a_program_that_can_not_be_watched_is_ended_and_not_to_blame(monkeypatch) -> None:
    """As where the process has no descriptor left."""

    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = {child.pid for child in psutil.Process().children()}
    monkeypatch.setattr(code_run.selectors, "DefaultSelector", refuse)
    with pytest.raises(RunError, match="can't be watched: .*Too many open files"):
        run_program("while True: pass")
    assert {child.pid for child in psutil.Process().children()} <= before
