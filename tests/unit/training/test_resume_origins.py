"""By what the base of a run is known again: folders of models, and a cache as the hub's client has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.partitions import FakePool, fake_state
from support.tiny import write_base
from transformers import AutoModelForCausalLM

from dsmixer.checkpoint.schema import CheckpointState
from dsmixer.config.errors import UserError
from dsmixer.config.schema import BaseConfig
from dsmixer.training import origins
from dsmixer.training.origins import base_changes, base_identity

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def identity(folder: Path) -> dict[str, str]:
    found = base_identity(BaseConfig(model=str(folder)))
    assert found is not None
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def other_numbers(base: Path) -> None:
    """A model trained on: the same shapes and file sizes."""
    path = base / "model.safetensors"
    tensors = {name: tensor + 0.25 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def other_name(base: Path) -> None:
    path = base / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.pu_proj", 1))


def one_byte_more(base: Path) -> None:
    with (base / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def other_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_numbers, "weights of another digest"),
        (other_name, "weights of another digest"),
        (one_byte_more, "weights of another digest"),
        (other_config, "another config.json"),
    ],
)
def test_another_base_under_the_same_name_is_told(
    base: Path, change: Callable[[Path], None], told: str
) -> None:
    before = identity(base)
    change(base)
    (line,) = base_changes(before, identity(base))
    assert line.startswith(f"base.model: {told} (") and "there" in line and "here" in line


def test_a_base_is_the_same_wherever_it_lies_and_whatever_lies_beside_it(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a card")
    (tmp_path / "copy" / "consolidated.safetensors").write_bytes(b"another format of them")
    assert identity(tmp_path / "copy") == identity(base)
    assert base_changes(None, identity(base)) == (), "a checkpoint that does not say"


def test_every_file_of_weights_in_parts_counts(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 1
    seen = {identity(tmp_path / "parts")["weights"]}
    for path in parts:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        seen.add(identity(tmp_path / "parts")["weights"])
    assert len(seen) == len(parts) + 1


def test_of_large_files_only_blocks_are_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread from the first byte to the last; a hole of a terabyte takes no time."""
    monkeypatch.setattr(origins, "BLOCK_BYTES", 16)
    path = base / "model.safetensors"
    before = identity(base)
    with path.open("r+b") as file:
        file.truncate(2**40)
    large = identity(base)
    with path.open("r+b") as file:
        file.seek(2**40 - 1)
        file.write(b"x")
    assert len({before["weights"], large["weights"], identity(base)["weights"]}) == 3


def test_a_base_of_the_hub_is_known_by_its_files_in_the_cache(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    named = BaseConfig(model="owner/tiny")
    assert base_identity(named) is None, "it is still to be downloaded"
    repository = tmp_path / "cache" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(base, repository / "snapshots" / COMMIT)
    assert base_identity(named) == identity(base)
    (repository / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert base_identity(named) is None, "the weights are still to be downloaded"


def test_a_folder_that_is_no_model_has_none(tmp_path: Path) -> None:
    """What loads it says why."""
    for text in (None, "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": "gone.safetensors"}}'):
        if text is not None:
            (tmp_path / "config.json").write_text("{}")
            (tmp_path / "model.safetensors.index.json").write_text(text)
        assert base_identity(BaseConfig(model=str(tmp_path))) is None
    assert base_identity(BaseConfig(model="no such folder/at/all")) is None


def test_a_state_without_the_base_is_read_and_one_of_another_kind_refused() -> None:
    values = fake_state(FakePool(2, ((1, 3),)), 3).to_dict()
    del values["base"]
    assert CheckpointState.from_dict(values, "state.json").base is None
    for other in ({**values, "more": 1}, {key: value for key, value in values.items() if key != "rows"}):
        with pytest.raises(UserError, match="checkpoint format"):
            CheckpointState.from_dict(other, "state.json")
