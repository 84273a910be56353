"""More than two hundred ways to spoil an adapter's folder, by accident or by intent.

Each starts from a sound folder, which is accepted, and does one thing to it. What a pickle would execute
leaves a mark in a file, which nothing may ever do.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.hostile_pickles import PICKLES, harmful, lie
from support.hostile_settings import numbers, other_kinds, targets, texts
from support.sound_adapter import (
    CONFIG,
    FIRST,
    FIRST_B,
    PATHS,
    PICKLE,
    SAFETENSORS,
    WIDTH,
    Hostile,
    Tensors,
    sound_config,
    sound_weights,
    write_config,
)


def hostile() -> Iterator[Hostile]:
    """All of them, by family."""
    for family, says in (
        (_cut, "damaged or cut short|is no archive"),
        (_headers, "damaged or cut short|holds no weights|of memory"),
        (_tensors, "holds NaN|is stored as|is empty|not of rank|the adapter maps"),
        (_bombs, "GB of memory|no list|the factors of"),
        (
            _keys,
            "no lora_A or lora_B|no module|no linear|whole weight|mixes|bias|embedding|no weights|no lora_B",
        ),
        (numbers, "the rank is|alpha is|expected a mapping|not of rank"),
        (targets, "at most|longer than|expected|broken|within|leaves out|no weights|not go together"),
        (
            other_kinds,
            "as it is|changed the base|not known|only LORA|is not none|no list|the factors|lora_E|rank is",
        ),
        (texts, "as JSON|no JSON object|bytes long"),
        (_files, "no regular|link|no such folder|folder has no|damaged or cut short|can't be looked|as JSON"),
        (_names, "can't be the name of an expert"),
        (_pickles, "the pickle|archive|no plain tensor|is stored as|larger than the file"),
    ):
        for case in family():
            yield replace(case, says=says)


def _cut() -> Iterator[Hostile]:
    """Files that end too early, or go on."""
    for tenth in range(20):
        yield Hostile(f"safetensors cut at {tenth}/20", _cut_at(SAFETENSORS, tenth / 20))
        yield Hostile(f"pickle cut at {tenth}/20", _cut_at(PICKLE, tenth / 20), form="pickle")
    for last in (1, 2, 4, 7):
        yield Hostile(f"safetensors without its last {last}", _cut_at(SAFETENSORS, -last))
    yield Hostile("safetensors with more behind", lambda f, _: _append(f / SAFETENSORS, b"\0" * 64))


def _cut_at(name: str, where: float) -> Callable[[Path, Path], object]:
    def cut(folder: Path, _: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(where) if where < 0 else int(where * len(data))])

    return cut


def _append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def _headers() -> Iterator[Hostile]:
    """Headers that lie about what follows."""

    def entry(shape: list[Any], begin: Any, end: Any, kind: Any = "F32") -> dict[str, Any]:
        return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}

    def lie(name: str, header: Any, data: bytes = b"\0" * 256, length: int | None = None) -> Hostile:
        return Hostile(f"header: {name}", lambda folder, _: _raw(folder, header, data, length))

    whole = entry([2, 16], 0, 128)
    yield lie("as long as all memory", {FIRST: whole}, length=2**63 - 1)
    yield lie("longer than the file", {FIRST: whole}, length=10_000)
    yield lie("empty", b"", length=0)
    yield lie("no JSON", b"{" * 40)
    yield lie("a list", b"[1, 2, 3]")
    yield lie("not UTF-8", b'{"\xff\xfe": 1}')
    yield lie("nested deep", b'{"a":' * 3_000 + b"1" + b"}" * 3_000)
    twice = json.dumps(whole).encode()
    key = json.dumps(FIRST).encode()
    yield lie("a name twice", b"{" + key + b":" + twice + b"," + key + b":" + twice + b"}", b"\0" * 128)
    yield lie("offsets beyond the file", {FIRST: entry([2, 16], 0, 4_096)})
    yield lie("offsets that overlap", {FIRST: whole, FIRST_B: entry([16, 2], 64, 192)})
    yield lie("offsets backwards", {FIRST: entry([2, 16], 128, 0)})
    yield lie("negative offsets", {FIRST: entry([2, 16], -128, 0)})
    yield lie("a hole", {FIRST: whole, FIRST_B: entry([16, 2], 160, 288)}, b"\0" * 288)
    yield lie("a shape larger than its data", {FIRST: entry([200, 160], 0, 128)})
    yield lie("a shape that overflows", {FIRST: entry([2**40, 2**40], 0, 128)})
    yield lie("a negative shape", {FIRST: entry([-2, -16], 0, 128)})
    yield lie("a shape of text", {FIRST: entry(["2", "16"], 0, 128)})
    yield lie("a shape of fractions", {FIRST: entry([2.5, 16], 0, 160)})
    yield lie("an unknown type", {FIRST: entry([2, 16], 0, 128, "PICKLE")})
    yield lie("a type that is a number", {FIRST: entry([2, 16], 0, 128, 7)})
    yield lie("no offsets", {FIRST: {"dtype": "F32", "shape": [2, 16]}})
    yield lie("an entry of null", {FIRST: None})
    yield lie("metadata of numbers", {"__metadata__": {"a": 1}, FIRST: whole}, b"\0" * 128)
    yield lie("nothing in it", {}, b"")
    yield Hostile("a tensor of a terabyte in a file of holes", _sparse)


def _raw(folder: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / SAFETENSORS).write_bytes(struct.pack("<Q", size) + text + data)


def _sparse(folder: Path, _: Path) -> None:
    size = 2**40
    _holes(folder, {FIRST: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, size)


def _holes(folder: Path, header: Any, size: int) -> None:
    _raw(folder, header, b"")
    with (folder / SAFETENSORS).open("r+b") as file:
        file.truncate((folder / SAFETENSORS).stat().st_size + size)


def _tensors() -> Iterator[Hostile]:
    """Weights that are no weights, in either kind of file."""
    made: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "NaN": lambda w: torch.full_like(w, float("nan")),
        "one NaN": lambda w: torch.where(torch.arange(w.numel()).view(w.shape) == 3, float("nan"), w),
        "infinity": lambda w: w * float("inf"),
        "integers": lambda w: w.to(torch.int64),
        "bytes": lambda w: w.to(torch.uint8),
        "truth": lambda w: w > 0,
        "nothing": lambda w: w[:0].contiguous(),
        "nothing, across": lambda w: w[:, :0].contiguous(),
        "one dimension": lambda w: w.flatten(),
        "three dimensions": lambda w: w[None].contiguous(),
        "a number": lambda w: w[0, 0].clone(),
        "transposed": lambda w: w.T.contiguous(),
        "half of its width": lambda w: w[:, : WIDTH // 2].contiguous(),
        "one rank more": lambda w: torch.cat([w, w[:1]]),
        "float64 beyond float32": lambda w: w.double() * 1e300,
    }
    for form in ("safetensors", "pickle"):
        for name, change in made.items():
            yield Hostile(f"{form}: {name}", _weights(lambda t, c=change: {**t, FIRST: c(t[FIRST])}), form)
    yield Hostile(
        "safetensors: complex numbers",
        _weights(lambda t: {**t, FIRST: torch.complex(t[FIRST], t[FIRST])}),
    )
    yield Hostile(
        "ranks that agree with each other alone",
        _weights(lambda t: {**t, FIRST: t[FIRST].repeat(2, 1), FIRST_B: t[FIRST_B].repeat(1, 2)}),
    )
    yield Hostile("outputs of another width", _weights(lambda t: {**t, FIRST_B: t[FIRST_B].repeat(2, 1)}))


def _bombs() -> Iterator[Hostile]:
    """Small files that would be large in memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def merged(rank: int, enabled: list[bool], shapes: tuple[list[int], list[int]]) -> Callable[..., object]:
        def write(folder: Path, _: Path) -> None:
            write_config(folder, {**sound_config(), "r": rank, "enable_lora": enabled})
            names = zip((FIRST, FIRST_B), shapes, strict=True)
            save_file({name: torch.ones(shape) for name, shape in names}, folder / SAFETENSORS)

        return write

    many = [True] + [False] * 500_000
    yield Hostile("a projection of half a million parts", merged(1, many, ([1, 4], [1_024, 1, 1])))
    grouped = merged(65_536, [True], ([65_536, 1], [65_536, 1, 1]))
    yield Hostile("a convolution of as many groups as ranks", grouped)
    half = memory // 2
    tiny = {FIRST: {"dtype": "F8_E4M3", "shape": [2, half // 2], "data_offsets": [0, half // 2 * 2]}}
    yield Hostile("eight bits a number, half of the memory", lambda f, _: _holes(f, tiny, half // 2 * 2))


def _weights(change: Callable[[Tensors], Tensors]) -> Callable[[Path, Path], object]:
    def write(folder: Path, _: Path) -> None:
        tensors = change(sound_weights())
        if (folder / PICKLE).exists():
            torch.save(tensors, folder / PICKLE)
        else:
            save_file(tensors, folder / SAFETENSORS)

    return write


def _keys() -> Iterator[Hostile]:
    """Names of weights that are no projection of the model, or are meant to be taken for a file."""
    odd = (
        "/etc/passwd",
        "../../../../tmp/owned",
        "C:\\Windows\\system32",
        "file:///etc/passwd",
        "~/.ssh/authorized_keys",
        "$(touch owned)",
        "`touch owned`; rm -rf .",
        "model.layers.0.self_attn.q_proj\0",
        "model.layers.0.self_attn.q_proj\n\x1b[2J\x1b]0;owned\x07",
        "model.layers.0.self_attn.q_proj\u202etxt",
        "model.layers.0.self_attn.ｑ_proj",
        "模型.層.零",
        "𝔪𝔬𝔡𝔢𝔩.\U0001f4a5",
        "\u200b\ufeff",
        "",
        ".",
        "..",
        "model..layers",
        "__class__.__init__.__globals__",
        "model.layers.99.self_attn.q_proj",
        "model.layers.-1.self_attn.q_proj",
        "model.norm",
        "model.layers.0.self_attn.q_proj." + "a" * 5_000,
    )
    for path in odd:
        yield Hostile(f"key {path[:40]!r}", _weights(lambda t, p=path: _moved(t, p)))
    for key in ("lora_A.weight", "weight", "base_model.model.", "lora_C", f"{FIRST}.weight.weight"):
        yield Hostile(f"whole key {key!r}", _weights(lambda t, k=key: _renamed(t, k)))
    yield Hostile("half a pair", _weights(lambda t: {k: w for k, w in t.items() if k != FIRST_B}))
    yield Hostile("a layer lost", _weights(lambda t: {k: w for k, w in t.items() if "layers.1" not in k}))
    yield Hostile("keys of two adapters", _weights(_two_adapters))
    yield Hostile("keys with and without prefix", _weights(lambda t: _renamed(t, FIRST[17:])))
    for more in ("model.embed_tokens.lora_embedding_A", "lm_head.weight", f"{PATHS[0]}.base_layer.bias"):
        key = f"base_model.model.{more}"
        yield Hostile(f"beside it {more}", _weights(lambda t, k=key: {**t, k: torch.ones(4, 4)}))
    yield Hostile("nothing at all", _weights(lambda t: {}))


def _renamed(tensors: Tensors, key: str) -> Tensors:
    return {key if name == FIRST else name: weight for name, weight in tensors.items()}


def _moved(tensors: Tensors, path: str) -> Tensors:
    return {name.replace(PATHS[0], path): weight for name, weight in tensors.items()}


def _two_adapters(tensors: Tensors) -> Tensors:
    key = FIRST.replace(".weight", ".{}.weight")
    more = {key.format("one"): tensors[FIRST], key.format("two"): tensors[FIRST].clone()}
    return {**{name: weight for name, weight in tensors.items() if name != FIRST}, **more}


def _files() -> Iterator[Hostile]:
    """What is no file, or is not there."""

    def put(name: str, make: Callable[[Path], object]) -> Callable[[Path, Path], object]:
        def replace(folder: Path, _: Path) -> None:
            (folder / name).unlink()
            make(folder / name)

        return replace

    for name in (CONFIG, SAFETENSORS):
        yield Hostile(f"{name}: missing", put(name, lambda path: None))
        yield Hostile(f"{name}: a pipe", put(name, os.mkfifo))
        yield Hostile(f"{name}: a folder", put(name, Path.mkdir))
        yield Hostile(f"{name}: a socket", put(name, _socket))
        yield Hostile(f"{name}: a device", put(name, lambda path: path.symlink_to("/dev/zero")))
        yield Hostile(f"{name}: a link to nothing", put(name, lambda path: path.symlink_to("nowhere")))
        yield Hostile(f"{name}: a link to itself", put(name, lambda path: path.symlink_to(path.name)))
        yield Hostile(f"{name}: a link out of it", put(name, lambda path: path.symlink_to("/etc/hostname")))
    yield Hostile("no folder", lambda folder, _: folder.rename(folder.with_name(f"{folder.name}-gone")))
    yield Hostile("a file for a folder", _file_for_folder)
    yield Hostile("safetensors that are a pickle", lambda f, mark: harmful(f / SAFETENSORS, mark))
    yield Hostile("a pickle beside broken safetensors", _both)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have no more than a hundred signs
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _file_for_folder(folder: Path, _: Path) -> None:
    folder.rename(folder.with_name(f"{folder.name}-gone"))
    folder.write_text("no folder")


def _both(folder: Path, _: Path) -> None:
    torch.save(sound_weights(), folder / PICKLE)
    (folder / SAFETENSORS).write_bytes(b"broken")


def _names() -> Iterator[Hostile]:
    """Experts whose folder would lie elsewhere."""
    odd = (
        "..",
        "../law",
        "/law",
        "a/b",
        "a\\b",
        "",
        ".",
        ".hidden",
        "a\0b",
        "law\n",
        "a" * 101,
        "lаw",
        "-law",
    )
    for name in (*odd, "law ", "\u202ewal", "%2e%2e", "a:b", "法"):
        yield Hostile(f"expert {name!r}", lambda folder, _: None, expert=name)


def _pickles() -> Iterator[Hostile]:
    """Pickles that would execute, and archives that lie."""
    for name, make in PICKLES.items():
        yield Hostile(f"pickle: {name}", lambda f, mark, m=make: m(f / PICKLE, mark), form="pickle")
    yield Hostile("archive: a bomb of zeros", _bomb("archive/data/0"), form="pickle")
    yield Hostile("archive: a bomb of a pickle", _bomb("archive/data.pkl"), form="pickle")
    storage = b"tq\x07QK\x00K\x02K\x10\x86"
    changes: dict[str, tuple[bytes, bytes]] = {
        "a storage of negative size": (b"cpuq\x06K ", b"cpuq\x06J\x00\x00\x00\xff"),
        "a tensor larger than its storage": (storage, b"tq\x07QK\x00K\x7fK\x7f\x86"),
        "a tensor outside its storage": (storage, b"tq\x07QK\x40K\x02K\x10\x86"),
        "a tensor that repeats a number for ever": (
            storage + b"q\x08K\x10K\x01\x86",
            b"tq\x07QK\x00J\x00\x00\x00\x7fJ\x00\x00\x00\x7f\x86q\x08K\x00K\x00\x86",
        ),
        "a record that is not there": (b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x00~q"),
        "a record outside the archive": (b"X\x01\x00\x00\x000q", b"X\x06\x00\x00\x00../../q"),
    }
    for name, change in changes.items():
        yield Hostile(f"archive: {name}", lambda f, _, c=change: lie(f / PICKLE, c), form="pickle")


def _bomb(name: str) -> Callable[[Path, Path], object]:
    def write(folder: Path, _: Path) -> None:
        with zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(name, b"\0" * 5_000_000)
            file.writestr("archive/version", b"3\n")

    return write
