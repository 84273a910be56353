"""``launch/train.py`` with a real signal at a chosen moment; leaves each rank's exit code beside the run.

    deepspeed ... driver_interrupted.py CODES SIGNAL STAGE STEP [arguments of launch/train.py]

SIGNAL is TERM or KILL (to the last rank, before that step) or SAVE (SIGKILL to rank 0 in the middle of
writing the checkpoint of that step).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from support.faults import interrupt_steps, kill_while_saving

from dsmixer.cli.train import main


def run() -> int:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    codes, kind, stage, step, *rest = arguments
    if kind == "SAVE" and os.environ["RANK"] == "0":
        kill_while_saving(int(stage), int(step))
    elif kind != "SAVE":
        number = signal.SIGTERM if kind == "TERM" else signal.SIGKILL
        interrupt_steps([[int(stage), int(step)]], number)
    code = main(rest)
    (Path(codes) / f"{kind}.{os.environ['RANK']}").write_text(str(code))
    return code


if __name__ == "__main__":
    sys.exit(run())
