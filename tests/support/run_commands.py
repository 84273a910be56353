"""Run many ``dsmixer`` commands in this process: ``run_commands.py COMMANDS.json RESULTS.json``.

Starting Python and importing the libraries takes seconds, which a hundred bad commands need not pay each. A
command's standard output and error are caught at the level of the process, whoever writes them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

from dsmixer.cli.main import main


def run_caught(arguments: list[str]) -> dict[str, object]:
    """Exit code, standard output and standard error of one command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = exit_code(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in enumerate(kept, 1):
                os.dup2(old, number)
                os.close(old)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    return {"returncode": code, "stdout": texts[0], "stderr": texts[1]}


def exit_code(arguments: list[str]) -> int:
    """What the process would exit with; an exception is printed as Python prints it, and is 1."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run_caught(arguments) for name, arguments in commands.items()}
    Path(sys.argv[2]).write_text(json.dumps(results))
