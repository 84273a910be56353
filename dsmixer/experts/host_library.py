"""The kernels of ``host_kernels.cpp``, compiled for this processor when they are first wanted.

The source depends on nothing but the C++ library and OpenMP, so that takes about two seconds. What comes out
lies beside what DeepSpeed builds, under a name made of the source, the flags, the compiler and the processor.
No torch here: ``dsmixer doctor`` looks where it is built on machines whose torch does not work.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("host_kernels.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
COMPILING = 300.0
"""Seconds after which a compiler is given up."""


class HostLibraryError(RuntimeError):
    """The kernels can't be compiled or loaded here; the message says why."""


@functools.cache
def host_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        HostLibraryError: there is no compiler, it fails, or there is no place for what it makes.
    """
    try:
        path = extensions_folder() / "dsmixer" / f"host_kernels-{_fingerprint()}.so"
        with contextlib.suppress(OSError):  # it is not there, or no library
            return ctypes.CDLL(str(path))
        _compile(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostLibraryError(str(error)) from error


@functools.cache
def has_host_library() -> bool:
    """Whether the kernels can be had here."""
    try:
        host_library()
    except HostLibraryError:
        return False
    return True


def extensions_folder() -> Path:
    """Where torch, and so DeepSpeed, keeps the extensions that it builds."""
    return Path(
        os.environ.get("TORCH_EXTENSIONS_DIR") or Path(os.path.expanduser("~/.cache")) / "torch_extensions"
    )


def compiler_command() -> list[str]:
    """The compiler, and what ``CXX`` wants before all other arguments, as ``torch.utils.cpp_extension``."""
    return shlex.split(os.environ.get("CXX") or "c++")


def _fingerprint() -> str:
    """Of all that the compiled file depends on; ``-march=native`` looks at the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    abilities = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    model = next((line for line in lines if line.startswith("model name")), "")
    about = (SOURCE.read_text(), *FLAGS, *compiler_command(), platform.machine(), model, abilities)
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def _first_error(text: str) -> str:
    """The first line of a compiler's output that is an error."""
    lines = text.strip().splitlines() or ["it says nothing"]
    return next((line.strip() for line in lines if "error" in line.lower()), lines[-1])


def _compile(path: Path) -> None:
    """Compile beside ``path``, then rename: ranks that do so at once do not meet, none sees half a file."""
    compiler, *first = compiler_command()
    if shutil.which(compiler) is None:
        raise HostLibraryError(f"there is no compiler {compiler!r}")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(descriptor)
    try:
        command = [compiler, *first, *FLAGS, "-o", name, str(SOURCE)]
        made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILING)
        if made.returncode:
            raise HostLibraryError(f"{compiler} fails: {_first_error(made.stderr)}")
        with open(name, "rb") as whole:
            os.fsync(whole.fileno())  # what is renamed before it is written may be cut off after a crash
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
