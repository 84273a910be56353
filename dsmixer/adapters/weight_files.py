"""The tensors of a file that a stranger wrote: safetensors, or a pickle of which nothing is executed.

What a header declares is held against the size of the file, and that against the memory of the machine,
before anything is allocated.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsmixer.adapters.untrusted import SAVE_AGAIN, parse_json, printable, regular_size, shown
from dsmixer.config.errors import UserError

SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_HEADER_BYTES = 32 * 2**20
MAX_PICKLE_BYTES = 8 * 2**20
AS_SAFETENSORS = "load it in PEFT where you trust it and save it again: save_pretrained writes safetensors"
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
        UserError: the file is not there or damaged, or a tensor is empty, not of floating point, or not
            finite.
    """
    size = _fitting_size(path)
    try:
        _check_header(path, size)
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        problem = f"the file is damaged or cut short ({printable(str(error))})"
        raise UserError(problem, where=shown(path), fix="copy or save it again") from error
    return _checked(path, tensors, empty)


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
        UserError: it asks for anything but tensors, is damaged, or a tensor is empty, not of floating
            point, or not finite.
    """
    size = _fitting_size(path)
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
    return _checked(path, values, empty)


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


def _fitting_size(path: Path) -> int:
    size = regular_size(path)
    if size is None:
        raise UserError("no such file", where=shown(path), fix=SAVE_AGAIN)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        problem = f"the file has {size / 1e9:,.0f} GB, and this machine {memory / 1e9:,.0f} GB of memory"
        raise UserError(problem, where=shown(path), fix="use a machine with more memory, or another adapter")
    return size


@torch.no_grad()
def _checked(path: Path, tensors: Mapping[str, torch.Tensor], empty: bool) -> dict[str, torch.Tensor]:
    def refuse(key: str, problem: str, fix: str) -> None:
        raise UserError(f"{printable(key)} {problem}", where=shown(path), fix=fix)

    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            refuse(key, f"is {tensor.dtype}", "save it in floating point")
        if tensor.numel() == 0 and not empty:
            refuse(key, "is empty", "save it again with gathered weights")
        found[key] = tensor.detach().to(torch.float32, copy=True)
        if not torch.isfinite(found[key]).all():
            refuse(key, "holds NaN or infinity", "use a sound adapter")
    return found
