"""The table of a run that decides between compute forms."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsmixer.config.errors import RunError, UserError
from dsmixer.experts import host_library
from dsmixer.experts.choice import MEASURED, FormTable
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.training.form_table import keep_table
from dsmixer.training.world import World

ALONE = World(0, 1, torch.device("cpu"))


def small_mixture() -> Mixture:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return attach_mixers(LlamaForCausalLM(config), MixerConfig("qv", ["a", "b"], rank=4))


def test_the_first_start_writes_it_and_the_next_one_takes_it(tmp_path: Path) -> None:
    path, mixture = tmp_path / "forms.json", small_mixture()
    keep_table(ALONE, path, mixture)
    assert FormTable.from_json(json.loads(path.read_text())) == MEASURED
    other = FormTable({**MEASURED.costs, "cpu": replace(MEASURED.costs["cpu"], always=7)})
    path.write_text(json.dumps(other.to_json()))
    keep_table(ALONE, path, mixture)
    assert [mixer.bank.table for mixer in mixture.mixers.values()] == [other, other]
    assert FormTable.from_json(json.loads(path.read_text())) == other, "it stays"


def test_a_run_that_began_without_kernels_goes_on_without_and_one_with_them_says_that_they_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    cached = (host_library.host_library, host_library.has_host_library)
    for function in cached:
        function.cache_clear()
    try:
        keep_table(ALONE, tmp_path / "without.json", small_mixture())
        assert capsys.readouterr().err == ""
        (tmp_path / "with.json").write_text(json.dumps(MEASURED.to_json()))
        keep_table(ALONE, tmp_path / "with.json", small_mixture())
        assert "began with kernels for the CPU, which can't be had now" in capsys.readouterr().err
    finally:
        monkeypatch.undo()
        for function in cached:
            function.cache_clear()
    mixture = small_mixture()
    keep_table(ALONE, tmp_path / "without.json", mixture)
    assert not any(mixer.bank.table.wants_kernels for mixer in mixture.mixers.values())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"cpu": {"rank": 1}}',
        json.dumps({"cpu": {**asdict(MEASURED.costs["cpu"]), "row": float("nan")}}),
        json.dumps({"cpu": {**asdict(MEASURED.costs["cpu"]), "row": 10**400}}),
        "[" * 100_000,
    ],
)
def test_another_file_is_named_and_left(text: str, tmp_path: Path) -> None:
    path = tmp_path / "forms.json"
    path.write_text(text)
    with pytest.raises(UserError, match="no table of compute forms") as raised:
        keep_table(ALONE, path, small_mixture())
    assert str(path) in str(raised.value) and path.read_text() == text


def test_a_table_that_can_not_be_written_leaves_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "forms.json"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
    try:
        with pytest.raises(RunError, match="too large"):
            keep_table(ALONE, path, small_mixture())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_other_devices_leaves_this_one_its_own() -> None:
    assert FormTable({}).of(torch.empty(1)) == MEASURED.costs["cpu"]
