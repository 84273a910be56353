"""Every kind of bad input ends with one message that names place and fix, and exit code 2; no file changes.

``pytest -s`` prints the table of cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import bad_folders, bad_recipes, bad_sources
from support.bad_input import CASES, Site, fill
from support.launching import REPOSITORY, launch
from support.outcomes import PREFIX, WRONG_INPUT, Outcome, outcomes_of, run, table
from support.small_disk import small_disk as mounted_disk
from support.tiny import write_base

assert bad_recipes and bad_sources and bad_folders  # importing them fills CASES

FAILED = 1


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models: llama, and gpt2 with its fused qkv."""
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "llama")
    write_base(folder / "gpt2", "gpt2")
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, bases: Path) -> Iterator[dict[str, Outcome]]:
    """All cases, run one after the other in one process."""
    found = outcomes_of(tmp_path_factory.mktemp("bad"), bases, CASES)
    yield found
    print(table(found, "kinds of bad input"))


@pytest.mark.parametrize("name", list(CASES))
def test_bad_input_ends_with_one_message_that_names_place_and_fix_and_changes_nothing(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    outcomes[name].check()


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("unknown stage", "unknown command")])
def test_nothing_but_the_message_is_on_standard_error(name: str, outcomes: dict[str, Outcome]) -> None:
    outcomes[name].check_alone()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a given size; it is gone after the test."""
    with ExitStack() as mounted:
        yield lambda size: mounted.enter_context(mounted_disk(tmp_path / "disk", size))


def launch_train(site: Site, *more: str) -> tuple[int, str]:
    """``deepspeed --num_accelerators 2 launch/train.py``, the real command."""
    arguments = ["--config", str(site.recipe), *more]
    done = launch(REPOSITORY / "launch" / "train.py", arguments, ranks=2)
    return done.returncode, done.output


def test_a_full_disk_is_refused_before_the_base_is_loaded(
    tmp_path: Path, bases: Path, small_disk: Callable[[str], Path]
) -> None:
    site, disk = Site(tmp_path / "site", bases), small_disk("64k")
    fill(disk)
    before = {path.name: path.stat().st_size for path in disk.iterdir()}
    done = run(["launch/train.py", "--config", str(site.recipe), f"run.dir={disk}"])
    assert done.returncode == WRONG_INPUT, done.stderr
    assert (
        done.stderr.startswith(f"{PREFIX}{disk}: no space left") and "\n  Fix: free some space" in done.stderr
    )
    assert {path.name: path.stat().st_size for path in disk.iterdir()} == before


def test_a_disk_that_fills_up_in_training_ends_both_ranks_with_one_message_and_whole_files(
    tmp_path: Path, bases: Path, small_disk: Callable[[str], Path]
) -> None:
    site, disk = Site(tmp_path / "site", bases), small_disk("1300k")
    more = [f"run.dir={disk}", "mixer.rank=256", "stage1.global_batch_size=2", "stage2.global_batch_size=2"]
    returncode, output = launch_train(site, *more)
    assert returncode == FAILED, output
    assert output.count(PREFIX) == 1 and "Traceback" not in output, output
    assert "could not be saved: No space left on device" in output and str(disk) in output
    assert "make room and run the same command again" in output
    left = [path.name for path in disk.rglob("*") if path.name.startswith((".saving-", "."))]
    assert left == []
    assert (disk / "mini" / "config.yaml").is_file()


def test_under_the_launcher_two_ranks_give_one_message_and_the_exit_code(tmp_path: Path, bases: Path) -> None:
    site = Site(tmp_path / "site", bases)
    path = site.data("chess.jsonl", '{"prompt": "a"}\n')
    before = site.tree()
    returncode, output = launch_train(site, "stage1.global_batch_size=2", "stage2.global_batch_size=2")
    assert returncode == WRONG_INPUT, output
    assert output.count(PREFIX) == 1 and f"{path}:1: completion" in output and "Traceback" not in output
    assert site.tree() == before


def test_a_recipe_that_failed_can_be_mended_and_run_under_the_same_name(tmp_path: Path, bases: Path) -> None:
    site = Site(tmp_path / "site", bases)
    good = site.recipe.read_text()
    site.change("targets: [q, v]", "targets: [q, wisdom_proj]")
    script = [str(REPOSITORY / "launch" / "train.py"), "--config", str(site.recipe)]
    assert run(script).returncode == WRONG_INPUT
    site.recipe.write_text(good)
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert (site.run / "mixture" / "mixer_config.json").is_file()
