"""Adapters of the hub, folders that have the name of one, and bases of other names."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from support.hub import COMMIT, serve_model
from support.sound_adapter import base, sound_config, write_config, write_sound

from dsmixer.adapters.importing import (
    BaseMismatchWarning,
    LeftOutWarning,
    base_mismatches,
    import_adapters,
    read_pool,
)
from dsmixer.adapters.sources import adapter_folder
from dsmixer.config.errors import UserError

Hub = Callable[[Path], list[str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serves a folder as ``someone/law``; the names of the files that are downloaded."""
    opened = []

    def serve(folder: Path) -> list[str]:
        served = serve_model(folder, "someone/law")
        address, downloaded = served.__enter__()
        opened.append(served)
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return downloaded

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield serve
    for served in opened:
        served.__exit__(None, None, None)


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_an_adapter_of_the_hub_is_downloaded_without_its_other_files(
    form: str, hub: Hub, tmp_path: Path
) -> None:
    folder = write_sound(tmp_path / "law", form)
    for other in ("README.md", "optimizer.pt", "training_args.bin", "tokenizer.json"):
        (folder / other).write_text("large")
    if form == "safetensors":
        (folder / "adapter_model.bin").write_text("the same weights again")
    downloaded = hub(folder)
    pool = read_pool({"law": "someone/law", "pinned": f"someone/law@{COMMIT}"})
    assert pool.ranks == {"law": 2, "pinned": 2}
    weights = "adapter_model.safetensors" if form == "safetensors" else "adapter_model.bin"
    assert sorted(downloaded) == sorted(["adapter_config.json", weights])


def test_a_folder_beats_an_id_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    write_sound(tmp_path / "someone" / "law")
    assert adapter_folder("someone/law") == Path("someone/law")
    assert read_pool({"law": "someone/law"}).ranks == {"law": 2}


def test_what_is_neither_a_folder_nor_to_be_had_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder, and the adapter could not be downloaded") as caught:
        read_pool({"law": "someone/law"})  # offline
    assert caught.value.where == "someone/law" and "OWNER/NAME@REVISION" in str(caught.value.fix)
    hub(write_sound(tmp_path / "served"))
    with pytest.raises(UserError, match="could not be downloaded"):
        read_pool({"law": "someone/chess@main"})
    for path in ("./someone/law", "/someone/law", "law", "a/b/c", "someone/law@../x y"):
        with pytest.raises(UserError, match="no such folder"):
            read_pool({"law": path})


@pytest.mark.parametrize(
    ("named", "given", "another"),
    [
        ("someone/some-model", "someone/other-model", True),
        ("someone/some-model", "someone/some-model", False),
        ("someone/Some-Model", "copies/some-model", False),
        ("someone/some-model", "/models/other-model", True),
        ("someone/some-model", "/models/Some-Model/", False),
        ("someone/some-model/", "someone/some-model", False),
        ("C:\\models\\some-model", "someone/some-model", False),
        ("someone/some-model", "/cache/models--someone--some-model/snapshots/0123abc", False),
        ("/home/someone/llama", "someone/other-model", True),
        ("./models/x/", "someone/other-model", True),
        ("gpt2", "someone/other-model", True),
        ("gpt2", "openai-community/gpt2", False),
        (None, "someone/other-model", False),
        ("", "someone/other-model", False),
        (["someone/x"], "someone/other-model", False),
        ("someone/some-model", None, False),
    ],
)
def test_another_base_is_told_wherever_the_names_differ(
    named: object, given: str | None, another: bool, tmp_path: Path
) -> None:
    folder = write_sound(tmp_path / "law")
    write_config(folder, {**sound_config(), "base_model_name_or_path": named})
    lines = base_mismatches(read_pool({"law": folder}), given)
    assert bool(lines) is another
    assert all(str(named) in line and str(given) in line and line.isprintable() for line in lines)


def test_names_of_strangers_are_told_harmlessly_and_a_revision_too(tmp_path: Path) -> None:
    folder, named = write_sound(tmp_path / "law"), {"base_model_name_or_path": "someone/x\x1b[2J"}
    write_config(folder, {**sound_config(), **named})
    (line,) = base_mismatches(read_pool({"law": folder}), "someone/some-model")
    assert line.isprintable() and "someone/x\\x1b[2J" in line
    write_config(folder, {**sound_config(), "revision": "v2"})
    pool = read_pool({"law": folder})
    (line,) = base_mismatches(pool, "someone/some-model", "main")
    assert "revision v2 of its base, not on main" in line
    assert base_mismatches(pool, "someone/some-model", "v2") == []
    assert base_mismatches(pool, "someone/some-model") == []


def test_import_adapters_warns_of_another_base_and_goes_on(tmp_path: Path) -> None:
    folder, model = write_sound(tmp_path / "law"), base()
    model.config._name_or_path = "someone/other-model"
    with pytest.warns(BaseMismatchWarning, match="trained on someone/some-model, not on someone/other-model"):
        import_adapters(model, {"law": folder})
    model = base()
    model.config._name_or_path = "someone/some-model"
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        mixture = import_adapters(model, {"law": folder})
    assert all(not parameter.requires_grad for _, parameter in mixture.expert_parameters())


def test_what_was_trained_beside_the_weights_is_told(tmp_path: Path) -> None:
    folder = write_sound(tmp_path / "law")
    (folder / "added_tokens.json").write_text('{"<pad>": 49}')  # the base embeds 50
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftOutWarning)
        import_adapters(base(), {"law": folder})
    (folder / "added_tokens.json").write_text('{"<pad>": 49, "<start>": 50, "<end>": 51}')
    for name in ("non_lora_trainables.bin", "value_head.safetensors"):
        (folder / name).write_text("never opened")
    told = r"besides the adapter \(non_lora_trainables.bin\) and a value head .* and 2 tokens that the base"
    with pytest.warns(LeftOutWarning, match=told):
        import_adapters(base(), {"law": folder})


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_sound(tmp_path / "adapters" / "law")
    assert read_pool({"law": "~/adapters/law"}).ranks == {"law": 2}


class _Broken(BaseHTTPRequestHandler):
    """Answers as a hub whose data break off, or that is none."""

    body: bytes = b""
    length = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.length or len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b'{"id": "someone/law"', 1_000),
        (b"<html>", 0),
        (b"[]", 0),
        (b'{"id": "someone/law", "siblings": [7]}', 0),
    ],
)
def test_a_hub_that_breaks_off_or_makes_no_sense_is_one_message(
    body: bytes, length: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = type("Broken", (_Broken,), {"body": body, "length": length})
    server = ThreadingHTTPServer(("127.0.0.1", 0), broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    try:
        with pytest.raises(UserError, match="could not be downloaded") as caught:
            adapter_folder("someone/law")
    finally:
        server.shutdown()
        server.server_close()
    assert caught.value.where == "someone/law" and caught.value.problem.isprintable()
