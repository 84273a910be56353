"""What may change while a run is under way, what is kept, and where ``--from`` goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.partitions import FakePool, FakeRanks, save_fake
from support.tiny import write_base

from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe, load_recipe
from dsmixer.training.checkpoints import Checkpoints
from dsmixer.training.lock import RunLock
from dsmixer.training.preflight import check_stage_order
from dsmixer.training.resume import TakeUp, carry_out, hold_base, take_up, told
from dsmixer.training.run_folder import RunFolder, claim_run_folder
from dsmixer.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
POOL, RANKS = FakePool(2, ((1, 3),)), FakeRanks(((0, 1),), 1)


class Run:
    """A run folder with checkpoints of stage one after steps 3, 6 and 9, saved with 8 rows a step."""

    def __init__(self, root: Path) -> None:
        self.path = root / "recipe.yaml"
        self.path.write_text(
            f"run: {{dir: {root / 'runs'}}}\nbase: {{model: tiny}}\n"
            "data: {domains: [{name: law, train: law.jsonl}, {name: chess, train: chess.jsonl}]}\n"
            "stage1: {gradient_accumulation_steps: 4}\nstage2: {global_batch_size: 8}\n"
        )
        self.lines: list[str] = []
        self.folder = RunFolder(root / "runs" / "run")
        first = self.recipe()
        claim_run_folder(first)
        (self.folder.path / "metrics.jsonl").write_text('{"stage": 1, "step": 9}\n')
        for step in (3, 6, 9):
            self.save(1, step)

    def save(self, stage: int, step: int, *overrides: str, **state: object) -> Path:
        config = dump_recipe(self.recipe(*overrides).recipe)
        folder = self.folder.checkpoints(stage)
        return save_fake(folder, POOL, RANKS, step, config=config, state={"stage": stage, **state})

    def recipe(self, *overrides: str) -> LoadedRecipe:
        return load_recipe(self.path, overrides)

    def checkpoints(self, size: int = 2) -> Checkpoints:
        # a rank that is alone with its collectives, and takes the run for one of so many ranks
        return Checkpoints(ALONE, self.folder, self.lines.append)

    def take_up(self, *overrides: str, size: int = 1, **asked: object) -> TakeUp:
        world = World(0, size, torch.device("cpu"))
        return take_up(world, self.checkpoints(), self.recipe(*overrides), (1, 2), **asked)  # type: ignore[arg-type]

    def start(self, *overrides: str, **asked: object) -> TakeUp:
        taken = self.take_up(*overrides, **asked)
        carry_out(taken, self.checkpoints())
        return taken

    def steps(self, stage: int = 1) -> list[str]:
        return sorted(path.name for path in self.folder.checkpoints(stage).glob("*"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


SAME_ROWS = "stage1.gradient_accumulation_steps=8"
"""On one rank; the run was saved on two, with four."""


@pytest.mark.parametrize(
    "override",
    [
        "placement.mode=replicate",
        "deepspeed.zero_stage=1",
        "checkpoint.keep=7",
        "run.log_every=5",
        "run.tensorboard=false",
        "base.activation_checkpointing=true",
        "base.attention=eager",
        "mixer.compute=loop",
        "evaluation.enabled=false",
        "health.hang_timeout=100",
        "data.cache_dir=cache",
        "stage1.micro_batch_size=2",
        "stage2.preserve.origin=host",
        SAME_ROWS,
    ],
)
def test_another_layout_goes_on_and_is_told(run: Run, override: str) -> None:
    taken = run.take_up(override)
    assert taken.changes.mathematics == ()
    assert [line.split(":")[0] for line in taken.changes.layout] == [override.split("=")[0]]
    assert override.split("=")[0] in told(taken, 1)[0]


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "stage1.learning_rate=0.5",
        "stage1.max_steps=20",
        "stage2.rsl.alpha=0.3",
        "data.max_length=99",
        "data.domains.0.weight=2.0",
        "data.domains.1.train=other.jsonl",
        "mixer.dropout=0.0",
        "base.dtype=float32",
        "base.model=other",
        "stage1.gradient_accumulation_steps=5",
        "stage2.global_batch_size=16",
    ],
)
def test_other_mathematics_is_refused_key_by_key_unless_allowed(run: Run, override: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(UserError, match="another configuration") as caught:
        run.take_up(override, "run.log_every=5")
    assert f"{key}: " in str(caught.value) and "--allow-changes" in str(caught.value)
    assert "step-00000009/config.yaml" in str(caught.value) and "log_every" not in str(caught.value)
    taken = run.start(override, allow_changes=True)
    assert any(line.startswith(f"{key}: ") for line in taken.changes.mathematics)
    assert any("as --allow-changes says" in line and key in line for line in told(taken, 1))
    noted = [json.loads(line) for line in (run.folder.path / "changes.jsonl").read_text().splitlines()]
    assert noted[0]["after"] == "stage1/step-00000009"
    assert load_recipe(run.folder.config).recipe == run.recipe(override).recipe


def test_an_allowed_change_is_asked_for_again_until_a_checkpoint_has_it(run: Run) -> None:
    """A start that is killed before it saves has changed nothing that a later start could go on from."""
    run.start("run.seed=1", allow_changes=True)
    with pytest.raises(UserError, match=r"run\.seed: 0 there, 1 here"):
        run.take_up("run.seed=1")
    run.start("run.seed=1", allow_changes=True)
    assert len((run.folder.path / "changes.jsonl").read_text().splitlines()) == 1
    run.save(1, 12, "run.seed=1")
    assert run.take_up("run.seed=1").changes.mathematics == ()


@pytest.mark.parametrize(
    ("size", "micro", "accumulation"), [(1, 1, 8), (4, 1, 2), (4, 2, 1), (2, 4, 1), (8, 1, 1)]
)
def test_the_rows_of_a_step_are_kept_on_other_ranks_and_micro_batches(
    run: Run, size: int, micro: int, accumulation: int
) -> None:
    from dsmixer.config.batch import accumulation_steps

    taken = (
        run.take_up(f"stage1.micro_batch_size={micro}", size=size) if size == 1 else kept(run, size, micro)
    )
    assert accumulation_steps(taken.loaded, "stage1", size) == accumulation
    assert dict(taken.changes.rows) == ({} if (size, micro) == (2, 1) else {"stage1": 8})
    assert f"{accumulation} accumulation steps" in told(taken, size)[-1]


def kept(run: Run, size: int, micro: int) -> TakeUp:
    """What ranks that are not there would find: pure arithmetic over the saved rows."""
    from dsmixer.config.changes import keep_rows, recipe_changes

    loaded = run.recipe(f"stage1.micro_batch_size={micro}")
    changes = recipe_changes(dump_recipe(run.recipe().recipe), loaded, {"stage1": 8}, size)
    return TakeUp(keep_rows(loaded, changes.rows, size), loaded, False, changes)


def test_rows_that_do_not_divide_are_refused_with_a_way_out(run: Run) -> None:
    with pytest.raises(UserError, match=r"8 rows a step.*3 ranks.*\n.*stage1.global_batch_size=ROWS"):
        kept(run, 3, 1)
    with pytest.raises(UserError, match=r"write stage1.micro_batch_size=2, or"):
        kept(run, 4, 3)


def test_a_deepspeed_file_that_fixes_the_batch_contradicts_kept_rows(run: Run, tmp_path: Path) -> None:
    from dsmixer.config.ds_json import merge_ds_config

    path = tmp_path / "ds.json"
    path.write_text('{"gradient_accumulation_steps": 4}')
    run.path.write_text(run.path.read_text().replace("stage1: {gradient_accumulation_steps: 4}\n", ""))
    run.path.write_text(run.path.read_text().replace("stage2: {global_batch_size: 8}\n", ""))
    loaded, _ = merge_ds_config(run.recipe(f"deepspeed.config={path}"))
    from dsmixer.config.changes import keep_rows

    with pytest.raises(UserError, match='write "auto" there'):
        keep_rows(loaded, {"stage1": 8}, 1)


@pytest.mark.parametrize("asked", ["6", "stage1/step-00000006", "PATH"])
def test_from_goes_back_and_sets_later_checkpoints_aside(run: Run, asked: str) -> None:
    run.save(2, 4)
    path = run.folder.checkpoints(1) / "step-00000006"
    asked = str(path) if asked == "PATH" else asked
    if asked == "6":
        (run.folder.checkpoints(2) / "step-00000004").rename(run.folder.path / "elsewhere")
    taken = run.start(start_from=asked)
    assert taken.back_to == (1, 6)
    assert run.checkpoints().newest(1) == path and run.checkpoints().newest(2) is None
    assert run.steps() == ["step-00000003", "step-00000006"]
    aside = run.folder.path / "checkpoints" / "set-aside" / "001"
    assert (aside / "stage1" / "step-00000009" / "manifest.json").is_file()
    assert (aside / "metrics.jsonl").is_file()
    assert (aside / "stage2" / "step-00000004").is_dir() == (asked != "6")
    assert any("none was removed" in line and "stage1/step-00000009" in line for line in run.lines)


def test_the_same_command_with_from_goes_on_and_one_without_it_forgets(run: Run) -> None:
    """A wrapper that starts the command again must not go back again and again."""
    run.start(start_from="6")
    run.save(1, 9)
    assert run.start(start_from="6").back_to is None
    assert run.steps()[-1] == "step-00000009"
    run.start()
    assert run.start(start_from="6").back_to is not None
    assert run.steps()[-1] == "step-00000006"
    assert (run.folder.path / "checkpoints" / "set-aside" / "002" / "stage1" / "step-00000009").is_dir()


def test_from_is_refused_for_what_is_not_of_this_run(run: Run, tmp_path: Path) -> None:
    other = save_fake(tmp_path / "other" / "checkpoints" / "stage1", POOL, RANKS, 6)
    for asked, message in (
        (str(other), "is not a checkpoint of this run"),
        ("nonsense", "is not a checkpoint of this run"),
        (str(run.folder.path), "is not a checkpoint of this run"),
        ("7", "there is no such checkpoint"),
        ("stage2/step-00000003", "is not a checkpoint of this run"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run.take_up(start_from=asked)
        assert "stage1/step-00000009" in str(caught.value), "what there is instead"
    assert run.steps()[-1] == "step-00000009"


def test_from_is_refused_for_another_stage_a_damaged_checkpoint_and_a_finished_run(run: Run) -> None:
    world = World(0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="of stage 1, which this call does not run"):
        take_up(world, run.checkpoints(), run.recipe(), (2,), start_from="stage1/step-00000006")
    (run.folder.checkpoints(1) / "step-00000006" / "config.yaml").write_text("run: {}\n")
    with pytest.raises(UserError, match=r"step-00000006/config.yaml: not what was saved"):
        run.take_up(start_from="6")
    run.folder.finished_mark.write_text("done\n")
    with pytest.raises(UserError, match="finished and its mixture published"):
        run.take_up(start_from="3")
    assert run.steps() == ["step-00000003", "step-00000006", "step-00000009"]


def test_a_run_that_has_saved_nothing_is_held_against_its_config(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for path in run.folder.checkpoints(1).glob("*"):
        path.rename(tmp_path / path.name)
    with pytest.raises(UserError, match=r"run/config.yaml: .*run.seed"):
        run.take_up("run.seed=1")
    assert run.take_up(size=1).changes.rows == {}


def spoil(path: Path) -> Path:
    """Damage a checkpoint."""
    (path / "config.yaml").write_text("run: {}\n")
    return path


FROZEN = "stage2.experts=frozen"


@pytest.mark.parametrize("lost", ["damaged", "removed", "not finished"])
def test_routers_are_not_trained_on_over_other_frozen_experts_than_theirs(run: Run, lost: str) -> None:
    """Where the end of stage one is lost, stage one goes on from what is whole; stage two is set aside."""
    end = run.save(1, 100, FROZEN)
    for step in (4, 8):
        run.save(2, step, FROZEN)
    assert run.take_up(FROZEN).back_to is None, "all is there"
    spoil(end) if lost == "damaged" else end.rename(run.path.with_name("elsewhere"))
    if lost == "removed":
        run.folder.checkpoints(1).rename(run.path.with_name("stage one"))
    taken = run.start(FROZEN, allow_changes=True)
    assert taken.orphaned and taken.back_to == ((1, 0) if lost == "removed" else (1, 9))
    assert run.checkpoints().newest(2) is None
    assert run.steps()[-1:] == ([] if lost == "removed" else ["step-00000009"])
    goes_on = "stage one begins anew" if lost == "removed" else "stage one goes on after step 9"
    assert any("warning" in line and goes_on in line for line in told(taken, 1))
    aside = run.folder.path / "checkpoints" / "set-aside" / "001"
    assert len(list(aside.glob("stage2/step-*/manifest.json"))) == 2
    assert (aside / "metrics.jsonl").is_file()
    assert (aside / "stage1" / "step-00000100").is_dir() == (lost == "damaged")
    assert any("none was removed" in line and "stage2/step-00000008" in line for line in run.lines)
    again = run.take_up(FROZEN, allow_changes=True)
    assert again.back_to is None and not again.orphaned


def test_an_older_end_of_stage_one_is_not_taken_for_the_one_of_frozen_experts(run: Run) -> None:
    """Stage one was made longer after its first end."""
    run.save(1, 100, FROZEN)
    spoil(run.save(1, 200, FROZEN, num_steps=200))
    run.save(2, 4, FROZEN)
    assert run.take_up(FROZEN).back_to == (1, 100)


def test_from_takes_no_routers_whose_frozen_experts_are_lost(run: Run) -> None:
    end = run.save(1, 100, FROZEN)
    run.save(2, 4, FROZEN)
    assert run.take_up(FROZEN, start_from="stage2/step-00000004").back_to == (2, 4)
    spoil(end)
    with pytest.raises(UserError, match="no whole checkpoint has them"):
        run.take_up(FROZEN, start_from="stage2/step-00000004")
    assert run.take_up(FROZEN, start_from="stage1/step-00000009", allow_changes=True).back_to == (1, 9)


@pytest.mark.parametrize("stages", [(1, 2), (2,)])
def test_stage_two_that_holds_its_experts_needs_nothing_of_stage_one(run: Run, stages: tuple[int]) -> None:
    """Not even one whole checkpoint, nor that it is read."""
    newest = run.save(2, 4)
    for path in run.folder.checkpoints(1).iterdir():
        spoil(path)
    taken = take_up(ALONE, run.checkpoints(), run.recipe(), stages)
    check_stage_order(run.recipe().recipe, stages, run.checkpoints())
    assert taken.back_to is None and taken.saved is not None
    assert (taken.saved.stage, taken.saved.step) == (2, 4)
    assert run.lines == []
    spoil(newest)
    with pytest.raises(UserError, match="the only checkpoint is not whole") as caught:
        take_up(ALONE, run.checkpoints(), run.recipe(), stages)
    assert f"move {run.folder.checkpoints(2)} away" in str(caught.value)


def test_other_files_of_the_base_are_other_mathematics(run: Run, tmp_path: Path) -> None:
    """Under the same name; where the checkpoint does not say what it was trained on, all are taken."""
    base = f"base.model={write_base(tmp_path / 'base')}"
    run.save(1, 12, base)
    kept = hold_base(run.checkpoints(), run.take_up(base))
    assert kept.base is not None and kept.changes.mathematics == ()
    run.save(1, 15, base, base=kept.base)
    assert hold_base(run.checkpoints(), run.take_up(base)).base == kept.base
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-00000015: .* base\.model: another config\.json") as caught:
        hold_base(run.checkpoints(), run.take_up(base))
    assert "--allow-changes" in str(caught.value)
    taken = hold_base(run.checkpoints(), run.take_up(base, allow_changes=True))
    carry_out(taken, run.checkpoints())
    assert "base.model: another config.json" in (run.folder.path / "changes.jsonl").read_text()
    assert any("as --allow-changes says: base.model" in line for line in told(taken, 1))


def test_the_same_base_in_another_folder_is_layout_and_another_one_there_mathematics(
    run: Run, tmp_path: Path
) -> None:
    base, copy = write_base(tmp_path / "base"), tmp_path / "copy"
    shutil.copytree(base, copy)
    here, there = f"base.model={base}", f"base.model={copy}"
    run.save(1, 12, here)
    with pytest.raises(UserError, match=r"base\.model: "):
        run.take_up(there)  # of a checkpoint that does not say what it was trained on
    run.save(1, 15, here, base=hold_base(run.checkpoints(), run.take_up(here)).base)
    taken = hold_base(run.checkpoints(), run.take_up(there, "base.revision=v2"))
    assert taken.changes.mathematics == ()
    assert sorted(line.split(": ")[0] for line in taken.changes.layout) == ["base.model", "base.revision"]
    assert any("the mathematics stays" in line and str(copy) in line for line in told(taken, 1))
    with pytest.raises(UserError, match=r"run\.seed: 0 there, 1 here") as caught:
        run.take_up(there, "run.seed=1")
    assert "base.model" not in str(caught.value)
    (copy / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"base\.model: .*base' there, .*copy' here"):
        run.take_up(there)


def test_other_libraries_are_told_and_not_refused(run: Run) -> None:
    from dsmixer.training.origins import installed_versions

    run.save(1, 12, versions=installed_versions())
    assert told(run.take_up(SAME_ROWS), 1)[1:] == []
    run.save(1, 15, versions={**installed_versions(), "torch": "1.0", "gone": "2"})
    (line,) = told(run.take_up(SAME_ROWS), 1)[1:]
    assert "other versions" in line and "torch: 1.0 there, " in line and "gone" not in line


def test_masks_of_dropout_that_another_layout_changes_are_told(run: Run) -> None:
    layout = {"ranks": 2, "zero_stage": 1, "expert_parallel_size": 1}
    run.save(1, 12, layout=layout)
    (line,) = [line for line in told(run.take_up(SAME_ROWS), 1) if "dropout" in line]
    assert "mixer.dropout is 0.1" in line and "ranks: 2 there, 1 here" in line
    assert not any("dropout" in line for line in told(run.take_up(SAME_ROWS), 2)), "the same ranks"
    (line,) = [line for line in told(run.take_up("stage1.micro_batch_size=2"), 2) if "dropout" in line]
    assert "stage1.micro_batch_size: 1 there, 2 here" in line
    run.save(1, 15, "mixer.dropout=0.0", layout=layout)
    assert not any("dropout" in line for line in told(run.take_up("mixer.dropout=0.0"), 1))


def test_a_new_run_that_another_job_began_meanwhile_is_not_written_into(tmp_path: Path) -> None:
    """It was read before its folder and lock could be made."""
    from dsmixer.training.run import _claim

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run: {{dir: {tmp_path / 'runs'}}}\nbase: {{model: tiny}}\n"
        "data: {domains: [{name: law, train: law.jsonl}, {name: chess, train: chess.jsonl}]}\n"
    )
    loaded = load_recipe(recipe)
    folder = RunFolder(tmp_path / "runs" / "run")
    checkpoints = Checkpoints(ALONE, folder, print)
    ours, others = (take_up(ALONE, checkpoints, loaded, (1, 2)) for _ in range(2))
    with RunLock(folder.lock) as lock:
        _claim(others, checkpoints, lock)  # and has ended since
    there = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert list(there) == [folder.config]
    with RunLock(folder.lock) as lock, pytest.raises(UserError, match="another job has begun") as caught:
        _claim(ours, checkpoints, lock)
    assert "run the same command again" in str(caught.value)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == there
    again = take_up(ALONE, checkpoints, loaded, (1, 2))
    (folder.checkpoints(1) / "step-00000003").mkdir(parents=True)
    with RunLock(folder.lock) as lock, pytest.raises(UserError, match="or gone on with it"):
        _claim(again, checkpoints, lock)
