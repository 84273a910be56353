"""What ranks read on their own machines: two real ranks, of which one finds what the other does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.launching import launch_environment

RANKS = """
import json, os, socket, sys
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from dsmixer.config.errors import RunError, UserError, from_os_error
from dsmixer.evaluation.harness_ranks import digest_of, read_alike

folder, child = Path(sys.argv[1]), os.fork()
rank = int(child == 0)
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
found = {"host": socket.gethostname()}

def read():
    try:
        return [json.loads((folder / case / str(rank)).read_text())]
    except OSError as error:
        raise from_os_error(error) from error

for case in ("alike", "missing here", "missing everywhere", "other records"):
    try:
        found[case] = ["read", read_alike(read, digest_of, "--tasks")]
    except (UserError, RunError) as error:
        found[case] = [type(error).__name__, str(error)]
(folder / f"{rank}.json").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_all_ranks_read_the_same_or_all_end_with_one_message_that_names_the_machine(tmp_path: Path) -> None:
    for case, prompts in (("alike", "pp"), ("other records", "pq"), ("missing here", "p")):
        (tmp_path / case).mkdir()
        for rank, prompt in enumerate(prompts):
            (tmp_path / case / str(rank)).write_text(json.dumps({"prompt": prompt}))
    subprocess.run(
        [sys.executable, "-c", RANKS, str(tmp_path)], env=launch_environment(), check=True, timeout=240
    )
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    host = found[0]["host"]
    for rank, one in enumerate(found):
        assert one["alike"] == ["read", [{"prompt": "p"}]]
        kind, text = one["missing here"]
        gone = tmp_path / "missing here" / "1"
        assert kind == "RunError" and text.startswith(f"{gone}: rank 1 ({host}): No such file or directory")
        assert "docs/multi-node.md" in text
        kind, text = one["missing everywhere"]
        gone = tmp_path / "missing everywhere" / "0"
        assert kind == "RunError" and text.startswith(f"{gone}: No such file"), rank
        kind, text = one["other records"]
        assert kind == "UserError"
        assert f"rank 0 ({host}) and rank 1 ({host}) have read different records" in text
