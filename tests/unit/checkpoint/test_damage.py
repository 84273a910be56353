"""One file of a checkpoint at a time flipped, cut or removed: it is named, and the one before is used."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.partitions import FakePool, FakeRanks, save_fake

from dsmixer.checkpoint.schema import MANIFEST, STATE
from dsmixer.checkpoint.verify import UnreadableError, damage, shared_out
from dsmixer.config.errors import UserError
from dsmixer.training.checkpoints import Checkpoints
from dsmixer.training.run_folder import RunFolder
from dsmixer.training.world import World

POOL = FakePool(3, ((2, 4), (1, 3)))
RANKS = FakeRanks(((0, 2), (1, 2)), 2, (0.4,) * 8)
ALONE = World(0, 1, torch.device("cpu"))


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def saved_twice(root: Path) -> tuple[RunFolder, Path, Path]:
    folder = RunFolder(root)
    paths = [
        save_fake(folder.checkpoints(1), POOL, RANKS, step, file_bytes=200, small={"usage": torch.ones(2)})
        for step in (3, 6)
    ]
    return folder, paths[0], paths[1]


@pytest.mark.parametrize("spoil", [flip, truncate, remove])
def test_damage_to_any_one_file_is_found_and_the_checkpoint_before_used(
    tmp_path: Path, spoil: Callable[[Path, random.Random], None]
) -> None:
    """Every file there is, manifest and state included; bits and lengths drawn at random, several times."""
    folder, before, newest = saved_twice(tmp_path)
    files = sorted(newest.iterdir())
    assert {MANIFEST, STATE, "config.yaml", "rank-00000.json"} < {file.name for file in files}
    assert len(files) > 10
    draw = random.Random(7)
    for file in files:
        whole = file.read_bytes()
        for _ in range(1 if spoil is remove else 5):
            spoil(file, draw)
            lines: list[str] = []
            found = Checkpoints(ALONE, folder, lines.append).newest(1)
            assert found == before, file
            assert len(lines) == 1 and str(file) in lines[0] and "before it" in lines[0], lines
            file.write_bytes(whole)
    assert damage(newest) is None


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    _, _, newest = saved_twice(tmp_path)
    manifest = newest / MANIFEST
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 7):
        for bit in range(8):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            manifest.write_bytes(content)
            problem = damage(newest)
            assert problem is not None and str(manifest) in problem, (place, bit, problem)


def test_a_stage_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path: Path) -> None:
    folder, before, newest = saved_twice(tmp_path)
    (before / MANIFEST).unlink()
    (newest / STATE).unlink()
    there = sorted(tmp_path.rglob("*"))
    lines: list[str] = []
    checkpoints = Checkpoints(ALONE, folder, lines.append)
    for _ in range(2):
        with pytest.raises(UserError, match="none of the 2 checkpoints is whole") as caught:
            checkpoints.newest(1)
    text = str(caught.value)
    assert f"{newest / STATE}: missing" in text and f"move {folder.checkpoints(1)} away" in text
    assert len(lines) == 1, "the one behind which there is another, once"
    assert sorted(tmp_path.rglob("*")) == there
    newest.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="the only checkpoint is not whole"):
        checkpoints.open(1)
    before.rename(tmp_path / "elsewhere too")
    assert checkpoints.open(1) is None, "a stage that has none begins"


def looped(path: Path) -> None:
    """What the system refuses to read, whoever asks: a link to itself."""
    path.rename(path.with_name("put-by"))
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", [MANIFEST, STATE, "rank-00000-000.safetensors", "."])
def test_what_the_system_refuses_to_read_is_not_taken_for_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """An older checkpoint would be gone on from, and a good one set aside, whenever a disk is away."""
    folder, _, newest = saved_twice(tmp_path)
    file = folder.checkpoints(1) if name == "." else newest / name
    looped(file)
    lines: list[str] = []
    for look in (Checkpoints(ALONE, folder, lines.append).newest, Checkpoints(ALONE, folder, print).open):
        with pytest.raises(UnreadableError, match="Too many levels of symbolic links"):
            look(1)
        error = capsys.readouterr().err
        assert error.startswith(f"dsmixer: error: {file}: Too many levels"), error
        assert "nothing was moved" in error and "Run the same command again" in error and "--from" in error
    assert lines == []


def test_what_can_not_be_read_stops_a_run_even_where_another_file_is_damaged(tmp_path: Path) -> None:
    folder, _, newest = saved_twice(tmp_path)
    (newest / STATE).unlink()
    looped(newest / "config.yaml")
    with pytest.raises(UnreadableError, match="config.yaml"):
        Checkpoints(ALONE, folder, print).newest(1)


def test_a_checkpoint_of_another_format_is_refused_and_not_taken_for_damaged(tmp_path: Path) -> None:
    folder, _, newest = saved_twice(tmp_path)
    (newest / MANIFEST).write_text('{"tensors.safetensors": {}, "state.json": {}}')
    with pytest.raises(UserError, match="checkpoint format 1, this version reads 2"):
        Checkpoints(ALONE, folder, print).newest(1)


def test_ranks_share_the_reading_of_the_files() -> None:
    """Each file by one rank, and about as many bytes each."""
    entries = {f"f{i}": {"bytes": size} for i, size in enumerate([100, 90, 50, 40, 30, 10])}
    shares = [shared_out(entries, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(entries)
    loads = [sum(int(entries[name]["bytes"]) for name in share) for share in shares]
    assert max(loads) - min(loads) <= 30, loads
