"""A process that ``dsmixer`` commands and Python files are forked from: libraries are imported once for all.

``doc_server.py serve NAME`` is the process; ``doc_server.py dsmixer ARGUMENTS`` and ``doc_server.py python
FILE`` are its callers. A command runs in a process of its own, with the caller's streams, working directory
and environment, and the caller ends with its exit code. A caller is started with ``python -SE`` and imports
nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any

NAME = "DSMIXER_DOC_SERVER"
"""The variable that tells a caller the server's name, an abstract address of a Unix socket."""

LARGEST = 1 << 17
SOCKET = (socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a message is one packet, however long it is


def call(what: str, arguments: list[str]) -> int:
    """Have the server run something on this process's streams; its exit code."""
    request = {"what": what, "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(*SOCKET) as server:
        server.connect("\0" + os.environ[NAME])
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        answer = server.recv(16)
    return int(answer) if answer else 1


def serve(name: str) -> int:
    """Answer callers; returns in the processes that are forked for them alone."""
    listener = socket.socket(*SOCKET)
    listener.bind("\0" + name)
    listener.listen(8)
    _import_libraries()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for a command
    while True:
        caller, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return _answer(caller)
        caller.close()


def _import_libraries() -> None:
    import gc

    import deepspeed  # noqa: F401
    import matplotlib.backends.backend_svg  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import dsmixer.cli.main
    import dsmixer.peft
    import dsmixer.training.run  # noqa: F401

    gc.freeze()


def _answer(caller: socket.socket) -> int:
    """Fork the command, wait for it and tell its code; in the command's own process, that code."""
    message, streams, _, _ = socket.recv_fds(caller, LARGEST, 3)
    pid = os.fork()
    if pid == 0:
        caller.close()
        return _work(json.loads(message), streams)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    caller.send(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def _work(request: dict[str, Any], streams: list[int]) -> int:
    for target, source in enumerate(streams):
        os.dup2(source, target)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["what"] == "dsmixer":
        from dsmixer.cli.main import main

        return main(request["arguments"])
    import runpy

    runpy.run_path(request["arguments"][0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[2]) if sys.argv[1] == "serve" else call(sys.argv[1], sys.argv[2:]))
