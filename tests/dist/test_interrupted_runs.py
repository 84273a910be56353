"""A run that is stopped, killed, and killed while it saves, against the same run left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.comparing import RunRecord, same_bits
from support.launching import REPOSITORY, TIMEOUT_SECONDS, Launched, launch
from support.tiny import write_recipe

pytestmark = pytest.mark.timeout(6 * TIMEOUT_SECONDS)

TRAIN = REPOSITORY / "launch" / "train.py"
DRIVER = Path(__file__).with_name("driver_interrupted.py")
ZERO = 2
KILLS = {"KILL": (2, 5), **({"SAVE": (2, 6)} if os.environ.get("DSMIXER_LONG") == "1" else {})}
"""Stage and step; ``SAVE`` is in the middle of a save, which ``tests/reliability`` does too."""


class Interrupted:
    """Two runs of one recipe on two ranks; the fixture has brought both to their end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = write_recipe(folder)
        self.launches: dict[str, Launched] = {}

    def arguments(self, name: str) -> list[str]:
        steps = [f"{stage}.max_steps=7" for stage in ("stage1", "stage2")]
        return ["--config", str(self.recipe), f"run.name={name}", f"deepspeed.zero_stage={ZERO}", *steps]

    def train(self, key: str, name: str) -> None:
        self.launches[key] = launch(TRAIN, self.arguments(name), ranks=2)

    def interrupt(self, kind: str, stage: int, step: int, name: str) -> None:
        arguments = [str(self.folder), kind, str(stage), str(step), *self.arguments(name)]
        self.launches[kind] = launch(DRIVER, arguments, ranks=2)

    def codes(self, kind: str) -> list[str]:
        """What ``main`` returned on each rank that came so far."""
        return [path.read_text() for path in sorted(self.folder.glob(f"{kind}.*"))]

    def record(self, name: str) -> RunRecord:
        return RunRecord(self.folder / "runs" / name)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """Checkpoints every three steps: the stop comes at one of its own, both kills between two."""
    runs = Interrupted(tmp_path_factory.mktemp("interrupted"))
    runs.train("alone", "alone")
    runs.interrupt("TERM", 1, 5, "broken")
    for kind, (stage, step) in KILLS.items():
        runs.interrupt(kind, stage, step, "broken")
    runs.train("resumed", "broken")
    runs.train("again", "broken")
    return runs


def test_the_main_command_trains_both_stages_and_exits_0(interrupted: Interrupted) -> None:
    interrupted.launches["alone"].check()
    run = interrupted.record("alone")
    assert [(row["stage"], row["step"]) for row in run.rows] == [(s, n) for s in (1, 2) for n in range(1, 8)]
    for name in ("config.yaml", "plan.json", "forms.json", "mixture/mixer_config.json", "report/index.html"):
        assert (run.folder / name).is_file(), name


def test_a_signal_to_one_rank_makes_every_rank_save_and_exit_75(interrupted: Interrupted) -> None:
    launched = interrupted.launches["TERM"]
    assert interrupted.codes("TERM") == ["75", "75"], launched.output[-4000:]
    assert launched.returncode == 75
    assert "step 5 of stage 1" in launched.output


@pytest.mark.parametrize("kind", KILLS)
def test_a_killed_rank_ends_the_job_as_failed(interrupted: Interrupted, kind: str) -> None:
    """Neither as done, nor as wrong input, nor as stopped in good order."""
    assert interrupted.launches[kind].returncode not in (0, 2, 75), interrupted.launches[kind].output[-4000:]
    assert "75" not in interrupted.codes(kind)


def test_a_run_stopped_and_killed_twice_ends_bit_for_bit_as_one_left_alone(interrupted: Interrupted) -> None:
    """Metrics with each step once, weights, moments, step counts, and the published files."""
    interrupted.launches["resumed"].check()
    alone, broken = interrupted.record("alone"), interrupted.record("broken")
    same_bits(broken, alone)
    files = sorted(path.relative_to(alone.folder) for path in alone.folder.glob("mixture/**/*.safetensors"))
    assert len(files) == 1 + 3 + 1, "routers, three experts, and the empty file that PEFT asks for"
    for file in files:
        assert (broken.folder / file).read_bytes() == (alone.folder / file).read_bytes(), file
    left = [path.name for path in broken.folder.glob("checkpoints/*/*") if not path.name.startswith("step-")]
    assert not left, "an unfinished save is still there"


def test_the_command_on_a_finished_run_says_so_and_exits_0(interrupted: Interrupted) -> None:
    again = interrupted.launches["again"].check()
    assert "is finished" in again.output
