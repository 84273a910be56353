"""One program under limits, in a process of its own: ``python -I code_runner.py``, its order on stdin.

Nothing of this package is imported here. The order is a JSON object: ``program`` (source), ``cpu_seconds``,
``memory``, ``file_size`` (bytes), ``open_files``, ``new_processes``, ``report`` (a file descriptor) and
``token``. What becomes of the program goes to the report, an object a line: first ``isolated``, at the end
``token`` if every line of the program was run, or ``error``.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import sys
import types

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38  # linux/prctl.h, linux/seccomp.h
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
NEW_PROCESS_CALLS = {
    "x86_64": (0xC000003E, (56, 57, 58, 435)),  # AUDIT_ARCH; clone, fork, vfork, clone3
    "aarch64": (0xC00000B7, (220, 435)),  # clone, clone3
}

libc = ctypes.CDLL(None, use_errno=True)


class Instruction(ctypes.Structure):
    """``struct sock_filter``."""

    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint32),
    )


class Filter(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction)))


def leave_network() -> bool:
    """Enter a network of its own, which has no device that is up; False where the kernel does not let us."""
    return any(libc.unshare(flags) == 0 for flags in (CLONE_NEWUSER | CLONE_NEWNET, CLONE_NEWNET))


def forbid_new_processes() -> bool:
    """Make starting a process or a thread fail from now on; False where nothing here can do it.

    The limit of ``resource`` does not bind root: a filter of system calls does.
    """
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    known = NEW_PROCESS_CALLS.get(platform.machine())
    if known is None:
        return os.getuid() != 0
    architecture, calls = known
    rows = [
        (LOAD_WORD, 0, 0, 4),  # seccomp_data.arch
        (JUMP_IF_EQUAL, 0, len(calls) + 1, architecture),  # another ABI: allowed, as is every other call
        (LOAD_WORD, 0, 0, 0),  # seccomp_data.nr
        *[(JUMP_IF_EQUAL, len(calls) - place, 0, call) for place, call in enumerate(calls)],
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, FAIL_WITH | errno.EAGAIN),
    ]
    listed = (Instruction * len(rows))(*[Instruction(*row) for row in rows])
    program = Filter(len(rows), listed)
    filtered = libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0
    return filtered or os.getuid() != 0


def limit(order: dict) -> None:
    """Set what the system counts: CPU time, memory, sizes of files, open files."""
    for kind, soft, hard in (
        (
            resource.RLIMIT_CPU,
            order["cpu_seconds"],
            order["cpu_seconds"] + 1,
        ),  # told at the one, killed at the other
        (resource.RLIMIT_AS, order["memory"], order["memory"]),
        (resource.RLIMIT_FSIZE, order["file_size"], order["file_size"]),
        (resource.RLIMIT_NOFILE, order["open_files"], order["open_files"]),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        given = resource.getrlimit(kind)[1]
        most = hard if given == resource.RLIM_INFINITY else min(hard, given)
        resource.setrlimit(kind, (min(soft, most), most))


def main() -> None:
    """Read the order, put the limits on, run the program, report."""
    order = json.loads(sys.stdin.buffer.read())

    def report(**what: object) -> None:
        os.write(order["report"], json.dumps(what).encode() + b"\n")

    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    network = leave_network()
    limit(order)
    processes = order["new_processes"] or forbid_new_processes()
    report(isolated={"network": network, "processes": processes and not order["new_processes"]})
    module = types.ModuleType("program")  # not __main__: what a script does when it is started is no test
    sys.modules["program"] = module
    try:
        exec(compile(order["program"], "<program>", "exec"), module.__dict__)
    except BaseException as error:  # whatever a program raises, SystemExit among it, is told
        report(error=f"{type(error).__name__}: {error}"[:300])
        raise
    report(token=order["token"])
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
