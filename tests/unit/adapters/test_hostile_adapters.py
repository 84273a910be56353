"""Spoiled and hostile folders: one message each, nothing executed, nothing written anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.hostile_adapters import hostile
from support.sound_adapter import Hostile, base, sound_config, write_config, write_sound

from dsmixer.adapters.importing import import_adapters
from dsmixer.config.errors import UserError
from dsmixer.model.inject import mixture_of, route_to

CASES = list(hostile())


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """One model for all: what is refused leaves it as it was."""
    return base()


@pytest.fixture(scope="module", autouse=True)
def untouched(model: torch.nn.Module) -> Iterator[None]:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def listing(folder: Path) -> dict[str, int]:
    """All that is in a folder, with the time of its last change."""
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_there_are_two_hundred_of_them() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 200


@pytest.mark.parametrize("case", CASES, ids=[ascii(case.name)[:60] for case in CASES])
def test_a_hostile_folder_is_refused_with_one_message(
    case: Hostile, model: torch.nn.Module, tmp_path: Path
) -> None:
    mark, folder = tmp_path / "executed", tmp_path / "adapter"
    case.make(write_sound(folder, case.form), mark)
    before = listing(tmp_path)
    with pytest.raises(UserError) as caught:
        import_adapters(model, {case.expert: folder})
    told = caught.value
    for text in (told.problem, told.where, told.fix):
        assert text is None or (text.isprintable() and len(text) < 1_000), text
    assert told.fix and re.search(case.says, told.problem), told.problem
    assert listing(tmp_path) == before and not mark.exists()


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_the_same_folder_unharmed_is_accepted(form: str, tmp_path: Path) -> None:
    model = base()
    import_adapters(model, {"law": write_sound(tmp_path / "adapter", form)})
    assert mixture_of(model).expert_names == ("law",)


TEXT_ALONE = ["/etc/passwd", "../../elsewhere", "\x1b[2J\n\u202e", "法律", "", "a" * 5_000]


@pytest.mark.parametrize("name", TEXT_ALONE, ids=ascii)
def test_the_name_of_a_base_is_text_alone(name: str, tmp_path: Path) -> None:
    model, folder = base(), write_sound(tmp_path / "adapter")
    write_config(folder, {**sound_config(), "base_model_name_or_path": name, "revision": name})
    before = listing(tmp_path)
    import_adapters(model, {"law": folder})
    assert listing(tmp_path) == before


def test_weights_behind_links_as_in_the_hubs_cache_are_read(tmp_path: Path) -> None:
    blobs, folder = write_sound(tmp_path / "blobs"), tmp_path / "snapshot"
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(f"../blobs/{path.name}")
    model, ids = base(), torch.arange(3, 9)[None]
    with torch.no_grad():
        without = model(ids).logits
        import_adapters(model, {"law": folder})
        with route_to(model, "law"):
            assert (model(ids).logits - without).abs().max() > 1e-3
