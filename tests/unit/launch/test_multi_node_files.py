"""The Slurm script under stand-ins for Slurm's commands, and the templates under DeepSpeed's own readers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import fetch_hostfile, parse_args
from support.launching import REPOSITORY

LAUNCH = REPOSITORY / "launch"

SRUN = """#!/usr/bin/env bash
# one task a node, as srun does
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node "$@" & tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    wait "$task" || { code=$?; ((code > highest)) && highest=$code; }
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then printf 'gpu-07\\ngpu-08\\n'; else echo "$@" >"$FOLDER/requeued"; fi
"""
DEEPSPEED = """#!/usr/bin/env bash
# a launcher: a shell above a rank, which ends with 75 when it is asked to stop
node="$(sed -n 's/.*--node_rank \\([0-9]*\\).*/\\1/p' <<<"$*")"
echo "$*" >"$FOLDER/command-$node"
cp "$2" "$FOLDER/hostfile-$node"
trap 'echo "the launcher heard it" >"$FOLDER/wrong-$node"' TERM
bash -c '
    RANK=$0 LOCAL_RANK=0 bash -c "
        trap \\"exit $CODE\\" TERM
        echo >\\"$FOLDER/ready-$0\\"
        read -r <\\"$FOLDER/never\\"
    "
    exit $?
' "$node"
"""


class SlurmJob:
    """The script on two nodes that are processes here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("deepspeed", DEEPSPEED)):
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "bin" / "python").symlink_to(sys.executable)
        for fifo in ("ready-0", "ready-1", "never"):
            os.mkfifo(folder / fifo)

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FOLDER": str(self.folder),
            "VENV": str(self.folder),
            "JOB_FOLDER": str(self.folder / "job"),
            "CODE": "75",
            "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "gpu-[07-08]",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "TMPDIR": str(self.folder),
            **variables,
        }
        command = ["bash", str(LAUNCH / "slurm.sbatch"), *arguments]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def stop(self, job: subprocess.Popen[str]) -> str:
        """Wait until both ranks are there, then do what Slurm does before the time is up."""
        for node in (0, 1):
            (self.folder / f"ready-{node}").read_text()
        job.send_signal(signal.SIGTERM)
        return job.communicate()[1]


@pytest.fixture
def slurm(tmp_path: Path) -> SlurmJob:
    return SlurmJob(tmp_path)


def test_the_slurm_script_starts_a_launcher_a_node_and_passes_the_signal_to_the_ranks_alone(
    slurm: SlurmJob,
) -> None:
    job = slurm.start("--config", "a recipe.yaml", "run.name=x")
    errors = slurm.stop(job)
    assert job.returncode == 75
    assert [line.partition(" (")[0] for line in errors.splitlines()] == [
        "supervise: told 1 ranks to save and stop"
    ] * 2
    for node in (0, 1):
        assert (slurm.folder / f"hostfile-{node}").read_text() == "gpu-07 slots=4\ngpu-08 slots=4\n"
        command = (slurm.folder / f"command-{node}").read_text()
        flags = f"--no_ssh --node_rank {node} --master_addr gpu-07 --master_port 21234"
        assert f" {flags} launch/train.py --config a recipe.yaml run.name=x\n" in command
        parse_args(command.split())
    assert not list(slurm.folder.glob("wrong-*")) and not (slurm.folder / "job").exists()
    assert not (slurm.folder / "requeued").exists()


def test_a_stopped_job_is_put_into_the_queue_again_where_that_is_asked_for(slurm: SlurmJob) -> None:
    job = slurm.start("--config", "r.yaml", REQUEUE="1", SLOTS="2", PORT="4000")
    slurm.stop(job)
    assert (slurm.folder / "requeued").read_text() == "requeue 41234\n"
    assert (slurm.folder / "hostfile-1").read_text() == "gpu-07 slots=2\ngpu-08 slots=2\n"
    assert "--master_port 4000 " in (slurm.folder / "command-0").read_text()


def test_a_failed_job_fails_and_is_not_put_into_the_queue_again(slurm: SlurmJob) -> None:
    job = slurm.start("--config", "r.yaml", REQUEUE="1", CODE="2")
    slurm.stop(job)
    assert job.returncode == 2 and not (slurm.folder / "requeued").exists()


def test_the_hostfile_template_is_one_that_deepspeed_reads() -> None:
    assert fetch_hostfile(str(LAUNCH / "hostfile.example")) == {"node-a": 8, "node-b": 8}


def test_the_command_in_the_environment_template_makes_a_file_that_deepspeed_exports(tmp_path: Path) -> None:
    """Its reader takes every line for NAME=VALUE, so the template's own command has to leave comments out."""
    template = LAUNCH / "deepspeed_env.example"
    command = re.search(r"^#   (grep .*)$", template.read_text(), re.MULTILINE)
    assert command is not None
    to = tmp_path / ".deepspeed_env"
    text = command[1].replace("launch/", f"{LAUNCH}/").replace("> .deepspeed_env", f"> {to}")
    subprocess.run(["bash", "-c", text], check=True)
    runner = PDSHRunner(parse_args(["--launcher", "pdsh", "train.py"]), "")
    for line in to.read_text().splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))  # as deepspeed.launcher.runner.main does
    assert len(runner.exports) == 7 and runner.exports["HF_HOME"] == "/shared/huggingface"
    assert not any('"' in value or "#" in value for value in runner.exports.values())
