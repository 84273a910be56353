"""Whole runs on two ranks that go on from a folder in which something is not as they left it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.comparing import RunRecord, same_bits
from support.forked import Job, RankServer
from support.launching import TIMEOUT_SECONDS, launch_environment
from support.tiny import write_recipe

pytestmark = pytest.mark.timeout(6 * TIMEOUT_SECONDS)


class Runs:
    """Copies of one run whose stage one is done; frozen experts, so that stage two needs them."""

    def __init__(self, folder: Path, server: RankServer) -> None:
        self.folder, self.server = folder, server
        self.recipe = write_recipe(folder)
        job = self.run("stage-one", "--stages", "1")
        assert list(job.codes.values()) == [0, 0], job.output[-4000:]

    def start(self, name: str, *more: str, ranks: int = 2) -> Job:
        arguments = ["--config", str(self.recipe), f"run.name={name}", "stage2.experts=frozen", *more]
        return self.server.start(arguments, ranks=ranks)

    def run(self, name: str, *more: str, ranks: int = 2) -> Job:
        return self.server.wait(self.start(name, *more, ranks=ranks))

    def copy(self, name: str, of: str = "stage-one") -> Path:
        return Path(shutil.copytree(self.folder / "runs" / of, self.folder / "runs" / name))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("resumed")
    with RankServer(folder) as server:
        yield Runs(folder, server)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_that_can_not_be_read_ends_all_ranks_as_failed_and_moves_nothing(runs: Runs) -> None:
    """So that a wrapper tries again; then the run goes on from the newest checkpoint after all."""
    folder = runs.copy("away")
    file = folder / "checkpoints" / "stage1" / "step-00000006" / "rank-00001.json"
    file.rename(runs.folder / "put-by")
    file.symlink_to(file.name)
    before = contents(folder)
    job = runs.run("away")
    assert job.codes == {0: 1, 1: 1}, job.output[-4000:]
    (line,) = job.lines("dsmixer: error")
    assert f"{file}: Too many levels of symbolic links" in line and "Traceback" not in job.output
    assert contents(folder) == before
    file.unlink()
    (runs.folder / "put-by").rename(file)
    job = runs.run("away")
    assert job.codes == {0: 0, 1: 0}, job.output[-4000:]
    assert "stage 2: step 6/6" in job.output and "stage 1: step" not in job.output


def taken_by_another(lock: Path) -> str:
    """The text of the lock that is now in the place of a job's own."""
    other = json.dumps({**json.loads(lock.read_text()), "host": "node-x", "machine": "m", "token": "t"})
    lock.with_name("new").write_text(other)
    lock.with_name("new").rename(lock)
    return other


def test_a_start_that_loses_its_lock_while_it_loads_claims_nothing(runs: Runs) -> None:
    folder = runs.copy("slow")
    before, lock = contents(folder), folder / ".lock"
    job = runs.start("slow", "run.log_every=2", ranks=1)
    while not lock.exists() or not lock.stat().st_size:
        runs.server.look()
    other = taken_by_another(lock)
    runs.server.wait(job)
    assert job.codes == {0: 1}, job.output[-4000:]
    (line,) = job.lines("dsmixer: error")
    assert str(lock) in line and "on node-x, since" in line and "Traceback" not in job.output
    assert contents(folder) == {**before, lock: other.encode()}


def test_a_lost_lock_ends_all_ranks_as_failed_and_leaves_the_folder_to_its_holder(runs: Runs) -> None:
    """Between two saves, too: none is due here."""
    folder = runs.folder / "runs" / "lost"
    job = runs.start("lost", "stage1.max_steps=100000", "checkpoint.every=100000")
    metrics, lock = folder / "metrics.jsonl", folder / ".lock"
    while (not metrics.exists() or metrics.read_bytes().count(b"\n") < 2) and not job.codes:
        runs.server.look()
    other = taken_by_another(lock)
    runs.server.wait(job)
    assert job.codes == {0: 1, 1: 1}, job.output[-4000:]
    (line,) = job.lines("dsmixer: error")
    assert str(lock) in line and "on node-x, since" in line and "Traceback" not in job.output
    assert lock.read_text() == other
    assert not list(folder.glob("checkpoints/**/*step-*")), "nor was anything saved"


def test_weights_of_another_base_under_the_same_name_are_refused_before_they_are_trained_on(
    runs: Runs,
) -> None:
    folder = runs.copy("base")
    weights = runs.folder / "llama" / "model.safetensors"
    own = weights.read_bytes()
    others = {name: tensor * 1.5 for name, tensor in load_file(weights).items()}
    before = contents(folder)
    try:
        save_file(others, weights, metadata={"format": "pt"})
        refused = runs.run("base", ranks=1)
        assert refused.codes == {0: 2}, refused.output[-4000:]
        assert "base.model: weights of another digest" in refused.output
        assert contents(folder) == before
        allowed = runs.run("base", "--allow-changes", ranks=1)
        assert allowed.codes == {0: 0}, allowed.output[-4000:]
        state = folder / "checkpoints" / "stage2" / "step-00000006" / "state.json"
        first = folder / "checkpoints" / "stage1" / "step-00000006" / "state.json"
        assert json.loads(state.read_text())["base"]["weights"] not in first.read_text()
    finally:
        weights.write_bytes(own)


def test_a_run_goes_on_over_a_copy_of_its_base_in_another_folder(runs: Runs) -> None:
    """Without a question; its tokens are the same too."""
    folder, copy = runs.copy("moved"), runs.folder / "elsewhere" / "llama"
    shutil.copytree(runs.folder / "llama", copy)
    job = runs.run("moved", f"base.model={copy}", ranks=1)
    assert job.codes == {0: 0}, job.output[-4000:]
    (line,) = job.lines("changed, and the mathematics stays")
    assert f"base.model: '{runs.folder / 'llama'}' there, '{copy}' here" in line
    assert not (folder / "changes.jsonl").exists()


@contextmanager
def edited(file: Path) -> Iterator[None]:
    """While another text stands in the first record of a file, as long as the one before."""
    own = file.read_text()
    record, rest = own.split("\n", 1)
    values = json.loads(record)
    other = json.dumps({**values, "completion": values["completion"][::-1] + "!"})
    file.write_text(f"{other}\n{rest}")
    try:
        yield
    finally:
        file.write_text(own)


@pytest.mark.parametrize("more", [["--stages", "2"], ["--from", "stage1/step-00000003"]])
def test_edited_data_are_refused_before_anything_is_touched(runs: Runs, more: list[str]) -> None:
    """Between the stages, where stage two has no cursor of its own yet; and on the way back."""
    name = f"edited{len(more[1])}"
    folder = runs.copy(name)
    before = contents(folder)
    with edited(runs.folder / "data" / "sums.jsonl"):
        job = runs.run(name, *more, ranks=1)
    assert job.codes == {0: 2}, job.output[-4000:]
    assert "another configuration is in this folder: data of stage 1: data: " in job.output
    assert "--allow-changes" in job.output and "Traceback" not in job.output
    assert contents(folder) == before


def test_edited_data_that_are_allowed_are_told_and_written_down(runs: Runs) -> None:
    """Allowing one key tells what else has changed."""
    folder = runs.copy("allowed")
    with edited(runs.folder / "data" / "sums.jsonl"):
        job = runs.run("allowed", "--allow-changes", "stage2.learning_rate=0.004", ranks=1)
    assert job.codes == {0: 0}, job.output[-4000:]
    (line,) = job.lines("changed, as --allow-changes says")
    (noted,) = (folder / "changes.jsonl").read_text().splitlines()
    for text in ("stage2.learning_rate: 0.005 there, 0.004 here", "data of stage 1: data: "):
        assert text in line and text in noted


def test_a_checkpoint_of_another_pool_is_refused_before_anything_is_touched(runs: Runs) -> None:
    folder = runs.copy("pool")
    before = contents(folder)
    asked = ["--allow-changes", "--from", "stage1/step-00000003", "mixer.rank=8"]
    job = runs.run("pool", *asked, ranks=1)
    assert job.codes == {0: 2}, job.output[-4000:]
    assert "the checkpoint does not fit: its experts have the ranks" in job.output
    assert contents(folder) == before


def test_ranks_that_have_read_other_texts_train_on_none_of_them(runs: Runs) -> None:
    """As many records, of which one is another: the domain is named."""
    own, other = runs.folder / "data" / "sums.jsonl", runs.folder / "other.jsonl"
    shutil.copy(own, other)
    fault = {"kind": "place", "place": "reading", "does": "reads", "rank": 1, "to": str(other)}
    arguments = ["--config", str(runs.recipe), "run.name=nodes"]
    with edited(other):
        job = runs.server.run(arguments, ranks=2, fault=fault)
    assert job.codes == {0: 2, 1: 2}, job.output[-4000:]
    assert "the ranks have read different data (sums: rank 1 has others than rank 0)" in job.output
    assert "Traceback" not in job.output and not (runs.folder / "runs" / "nodes").exists()


def test_stage_two_over_frozen_experts_that_are_damaged_is_trained_again_over_those_of_the_end(
    runs: Runs,
) -> None:
    """Both stages end bit for bit as those of a run that lost nothing; what was there is set aside."""
    alone = runs.copy("alone")
    job = runs.run("alone")
    assert job.codes == {0: 0, 1: 0}, job.output[-4000:]
    folder = runs.copy("damaged", of="alone")
    (folder / ".finished").unlink()
    shutil.rmtree(folder / "checkpoints" / "stage2" / "step-00000006")
    (folder / "checkpoints" / "stage1" / "step-00000006" / "rank-00000.json").write_text("{}")
    job = runs.run("damaged")
    assert job.codes == {0: 0, 1: 0}, job.output[-4000:]
    assert "stage one goes on after step 3, and stage two begins anew after it" in job.output
    same_bits(RunRecord(folder), RunRecord(alone))
    aside = folder / "checkpoints" / "set-aside" / "001"
    assert {path.name for path in aside.iterdir()} == {"stage1", "stage2", "metrics.jsonl"}


NOTED = """
import os, sys
fsync, rename = os.fsync, os.rename
def noted_fsync(descriptor):
    print("NOTED fsync", os.readlink(f"/proc/self/fd/{descriptor}"), flush=True)
    fsync(descriptor)
def noted_rename(source, target, **named):
    print("NOTED rename", target, flush=True)
    rename(source, target, **named)
os.fsync, os.rename = noted_fsync, noted_rename
from dsmixer.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_rows_are_on_the_disk_before_the_checkpoint_they_lead_to_and_no_step_waits_for_them(
    runs: Runs,
) -> None:
    """A power cut that leaves a checkpoint leaves the rows up to its step."""
    arguments = ["train", "--stages", "1", "--config", str(runs.recipe), "run.name=noted"]
    ended = subprocess.run(
        [sys.executable, "-c", NOTED, *arguments, "stage1.max_steps=5", "checkpoint.every=2"],
        env={**os.environ, **launch_environment()},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    noted = [line.split("NOTED ")[1] for line in ended.stdout.splitlines() if "NOTED " in line]
    metrics, stage = f"fsync {runs.folder}/runs/noted/metrics.jsonl", "/checkpoints/stage1/step-0000000"
    order = [
        line.rsplit("/", 1)[1] for line in noted if line == metrics or ("rename " in line and stage in line)
    ]
    steps = [f"step-0000000{step}" for step in (2, 4, 5)]
    assert order == [name for step in steps for name in ("metrics.jsonl", step)]
