"""The tensors of a file that a stranger wrote: safetensors, or a pickle of which nothing is executed.

What a header declares is held against the size of the file, and what it is as float32 against the memory that
is free, before anything is allocated.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsmixer.adapters.memory import check_memory, enough_memory
from dsmixer.adapters.untrusted import SAVE_AGAIN, parse_json, printable, regular_size, shown
from dsmixer.config.errors import UserError

SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_HEADER_BYTES = 32 * 2**20
MAX_PICKLE_BYTES = 8 * 2**20
AS_SAFETENSORS = "load it in PEFT where you trust it and save it again: save_pretrained writes safetensors"
READABLE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Types whose numbers are the weights themselves, by the names that safetensors gives them."""
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")

UNPICKLING = (
    *(pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError),
    *(ArithmeticError, AssertionError, MemoryError, OSError, ImportError, struct.error),
)
"""What torch raises on pickles that are damaged or made to harm: it interprets them itself, so almost all."""


def read_weights(folder: Path, *, empty: bool = False) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file of weights that an adapter's folder has, safetensors if both are there, and its tensors.

    Args:
        folder: of the adapter.
        empty: whether a tensor may be empty, as AdaLoRA's are where it kept no rank.

    Raises:
        UserError: there is none, or it is refused.
    """
    for name, read in ((SAFETENSORS, read_safetensors), (PICKLE, read_pickle)):
        if regular_size(folder / name) is not None:
            return folder / name, read(folder / name, empty=empty)
    raise UserError(
        f"the folder has no weights, neither {SAFETENSORS} nor {PICKLE}",
        where=shown(folder),
        fix="give the folder that PEFT's save_pretrained wrote",
    )


def read_safetensors(path: Path, *, empty: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of a file as float32 on the CPU.

    Args:
        path: of the file.
        empty: whether a tensor may be empty.

    Raises:
        UserError: the file is not there, damaged or larger than the memory that is free, or a tensor is
            empty, not of floating point, or not finite.
    """
    size = _size(path)
    with enough_memory(shown(path)), _told_of_damage(path):
        _check_header(path, size)
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            declared = {key: (own.get_dtype(), own.get_shape()) for key, own in slices.items()}
            _check_declared(path, declared, empty)
            return _as_float32(path, ((key, file.get_tensor(key)) for key in declared))


@contextmanager
def _told_of_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        problem = f"the file is damaged or cut short ({printable(str(error))})"
        raise UserError(problem, where=shown(path), fix="copy or save it again") from error


def _check_header(path: Path, size: int) -> None:
    """What safetensors itself lets pass: a name twice, of which it takes the last."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, MAX_HEADER_BYTES):
            raise ValueError(f"its header would be {length:,} bytes long")
        parse_json(file.read(length))


def read_pickle(path: Path, *, empty: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of a file that ``torch.save`` wrote, as float32 on the CPU, with nothing executed.

    Args:
        path: of the file.
        empty: whether a tensor may be empty.

    Raises:
        UserError: it asks for anything but tensors, is damaged or larger than the memory that is free, or a
            tensor is empty, not of floating point, or not finite.
    """
    size = _size(path)
    _check_archive(path, size)
    try:
        # mapped, so that a storage is a part of the file and can't be larger than it
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNPICKLING as error:
        asked = _GLOBAL.search(str(error))
        reason = printable(str(error) or type(error).__name__)
        problem = (
            f"the pickle asks for {printable(asked[1])}, and was not executed"
            if asked
            else f"the pickle is damaged or holds more than tensors ({reason})"
        )
        raise UserError(problem, where=shown(path), fix=AS_SAFETENSORS) from error
    if not isinstance(values, dict):
        problem = f"the pickle holds a {type(values).__name__}, not tensors by name"
        raise UserError(problem, where=shown(path), fix=AS_SAFETENSORS)
    _check_storages(path, values, size)
    declared = {key: (_name_of(value.dtype), value.shape) for key, value in values.items()}
    _check_declared(path, declared, empty)
    with enough_memory(shown(path)):
        return _as_float32(path, values.items())


def _name_of(dtype: torch.dtype) -> str:
    return next((name for name, known in READABLE.items() if known == dtype), str(dtype))


def _check_archive(path: Path, size: int) -> None:
    """Refuse an archive that would be larger in memory than on the disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        problem = f"is no archive as torch.save writes them ({printable(str(error))})"
        raise UserError(problem, where=shown(path), fix=AS_SAFETENSORS) from error
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > size:
        problem = (
            "the archive is compressed or declares more than the file holds, which torch.save never does"
        )
        raise UserError(problem, where=shown(path), fix=AS_SAFETENSORS)
    if any(entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES for entry in entries):
        problem = f"a pickle in the archive is longer than {MAX_PICKLE_BYTES:,} bytes"
        raise UserError(problem, where=shown(path), fix=AS_SAFETENSORS)


def _check_storages(path: Path, values: Mapping[Any, Any], size: int) -> None:
    """Refuse what is no plain tensor, and tensors that repeat a part of the file without end."""
    for key, value in values.items():
        kind = "" if isinstance(key, str) else "its name is no text"
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            kind = type(value).__name__
        elif value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = f"{value.layout}, {value.dtype}, {value.device}"
        if kind:
            problem = f"{printable(key)} is no plain tensor ({printable(kind)})"
            raise UserError(problem, where=shown(path), fix=AS_SAFETENSORS)
    if sum(value.numel() * value.element_size() for value in values.values()) > size:
        raise UserError("its tensors would be larger than the file", where=shown(path), fix=AS_SAFETENSORS)


def _size(path: Path) -> int:
    size = regular_size(path)
    if size is None:
        raise UserError("no such file", where=shown(path), fix=SAVE_AGAIN)
    check_memory(size, shown(path))
    return size


def _check_declared(path: Path, declared: Mapping[str, tuple[str, Sequence[int]]], empty: bool) -> None:
    """Refuse tensors by their types and shapes, before they are read."""
    for key, (kind, shape) in declared.items():
        if kind not in READABLE:
            problem = f"{printable(key)} is stored as {printable(kind)}, which can't be read"
            fix = "save it again as float32, float16 or bfloat16"
            raise UserError(problem, where=shown(path), fix=fix)
        if 0 in shape and not empty:
            fix = "save it again with gathered weights"
            raise UserError(f"{printable(key)} is empty", where=shown(path), fix=fix)
    check_memory(sum(4 * math.prod(shape) for _, shape in declared.values()), shown(path))


@torch.no_grad()
def _as_float32(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One after the other, so that a file is not in memory twice."""
    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors:
        found[key] = tensor.detach().to(torch.float32, copy=True)
        if not torch.isfinite(found[key]).all():
            problem = f"{printable(key)} holds NaN or infinity"
            raise UserError(problem, where=shown(path), fix="use a sound adapter")
    return found
