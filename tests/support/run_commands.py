"""Run many ``dsmixer`` commands: ``run_commands.py COMMANDS.json RESULTS.json``.

Starting Python and importing the libraries takes seconds, which a hundred bad commands need not pay each:
each is a process of its own, forked from one that has imported them. Exit code and output are its own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import dsmixer.training.run  # noqa: F401  what the commands import when they are called
from dsmixer.cli.main import main


def run_caught(arguments: list[str]) -> dict[str, object]:
    """Exit code, standard output and standard error of one command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.exit(main(arguments))
        _, status = os.waitpid(child, 0)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    return {"returncode": os.waitstatus_to_exitcode(status), "stdout": texts[0], "stderr": texts[1]}


if __name__ == "__main__":
    gc.freeze()  # what is imported is never garbage: no command looks through it as it ends
    commands = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run_caught(arguments) for name, arguments in commands.items()}
    Path(sys.argv[2]).write_text(json.dumps(results))
