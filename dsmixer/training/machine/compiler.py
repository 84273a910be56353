"""What DeepSpeed needs to build its ops when it starts: compiler, headers, ninja, a folder, no stale lock."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dsmixer.experts.host_library import HostLibraryError, compiler_command, extensions_folder, host_library
from dsmixer.training.machine.child import run_child
from dsmixer.training.machine.finding import Finding, ok, problem, warning
from dsmixer.training.machine.open_files import is_open
from dsmixer.training.machine.probing import Answers

SOURCE = """\
#include <Python.h>
#include <omp.h>
#include <vector>
extern "C" int answer() { std::vector<int> all(omp_get_max_threads() > 0 ? 42 : 0, 1); return all.size(); }
"""
"""What the ops lean on: Python's headers, OpenMP, the C++ library."""

ANSWER = 42


def check_building(answers: Answers, seconds: float) -> list[Finding]:
    """Compile, load and run a small extension; ninja; locks of builds; what DeepSpeed says; the CUDA toolkit.

    Args:
        answers: of the probe.
        seconds: how long the compiler may take.
    """
    gpus = int(answers["torch"].facts.get("count", 0)) > 0
    found = [_compiler(gpus, seconds), _ninja(gpus, seconds), *_locks(extensions_folder())]
    found.append(_ops(answers))
    found.append(_toolkit(answers, seconds) if gpus else _kernels())
    return found


def _kernels() -> Finding:
    """Those of the mixers for the CPU."""
    try:
        host_library()
    except HostLibraryError as error:
        fix = "see the line compiler; a newer g++ may do. Without them the mixers take slower forms"
        return warning("CPU kernels", str(error), fix)
    return ok("CPU kernels", "those of the mixers are compiled for this processor")


def _lacking(check: str, gpus: bool, found: str, fix: str) -> Finding:
    """On the CPU every run builds an op; on GPUs those alone that offload the optimizer."""
    if gpus:
        return warning(check, f"{found}; runs that offload the optimizer need it", fix)
    return problem(check, f"{found}; DeepSpeed builds an op when it starts", fix)


def _compiler(gpus: bool, seconds: float) -> Finding:
    name, *first = compiler_command()
    path = shutil.which(name)
    if path is None:
        return _lacking("compiler", gpus, f"there is no {name}", "install one, such as: apt-get install g++")
    there = extensions_folder()
    try:
        there = nearest_folder(there)
        with tempfile.TemporaryDirectory(prefix=".dsmixer-doctor-", dir=there) as folder:
            trouble = _build([path, *first], Path(folder), seconds)
    except OSError as error:
        fix = "free space there, make it writable, or set TORCH_EXTENSIONS_DIR to another folder"
        return _lacking("compiler", gpus, f"nothing can be built in {there}: {error.strerror}", fix)
    if trouble is not None:
        return _lacking("compiler", gpus, f"{path} fails: {trouble[0]}", trouble[1])
    version = run_child([path, "--version"], seconds).out.splitlines()
    return ok("compiler", f"{path} builds extensions ({version[0] if version else 'no version'})")


def _build(compiler: list[str], folder: Path, seconds: float) -> tuple[str, str] | None:
    """Build the small extension and run it; what is wrong, and the fix."""
    source, library = folder / "small.cpp", folder / "small.so"
    source.write_text(SOURCE)
    include = f"-I{sysconfig.get_paths()['include']}"
    flags = ["-O2", "-fopenmp", "-fPIC", "-shared", include]
    ended = run_child([*compiler, *flags, str(source), "-o", str(library)], seconds, {"TMPDIR": str(folder)})
    if ended.trouble is not None:
        return _first_error(ended.err) or ended.trouble, _compiler_fix(ended.err)
    try:
        answered = ctypes.CDLL(str(library)).answer()
    except (OSError, AttributeError) as error:
        fix = "set TORCH_EXTENSIONS_DIR to a folder of a file system without noexec; check LD_LIBRARY_PATH"
        return f"what it built can't be loaded ({error})", fix
    wrong = f"what it built computes {answered} instead of {ANSWER}"
    return None if answered == ANSWER else (wrong, "install another compiler")


def _first_error(text: str) -> str | None:
    """The first line of a compiler's output that is an error."""
    return next((line.strip() for line in text.splitlines() if "error" in line.lower()), None)


def _compiler_fix(text: str) -> str:
    if "Python.h" in text:
        return "install Python's headers, such as: apt-get install python3-dev"
    if "omp" in text:
        return "install OpenMP for it, such as: apt-get install libgomp1 (libomp-dev for clang)"
    if "No space left" in text:
        return "free some space there, or set TORCH_EXTENSIONS_DIR to a folder on another disk"
    return "install g++, such as: apt-get install g++; CXX names another compiler"


def _ninja(gpus: bool, seconds: float) -> Finding:
    ended = run_child(["ninja", "--version"], seconds)
    if ended.trouble is not None:
        fix = "pip install ninja, and activate the environment: source .venv/bin/activate"
        return _lacking("ninja", gpus, ended.trouble, fix)
    return ok("ninja", f"{ended.out.strip()}, {shutil.which('ninja')}")


def _locks(folder: Path) -> Iterator[Finding]:
    """Locks of builds that were killed: the next build waits for them without an end."""
    left = [lock for lock in folder.glob("**/lock") if not is_open(lock)]
    if left:
        shown = " ".join(map(str, left[:5]))
        yield warning(
            "op builds", f"{len(left)} left locked by a build that was killed: {shown}", f"run: rm {shown}"
        )
    elif os.path.isdir(folder):
        built = sorted(path.stem for path in folder.glob("**/*.so"))
        yield ok("op builds", f"{folder}: {', '.join(built) or 'nothing built yet'}")
    else:
        yield ok("op builds", f"{folder}: nothing built yet")


def _ops(answers: Answers) -> Finding:
    answer = answers["ops"]
    if answer.failed:
        return warning("ops", f"{answer.trouble}", f"see {answer.needed or 'deepspeed'}")
    refused = [op for op in ("shared memory", "CPU Adam") if not answer.facts[op]]
    if refused:
        fix = "run ds_report, which says what each op lacks"
        return warning("ops", f"DeepSpeed can't build on this machine: {', '.join(refused)}", fix)
    return ok("ops", "DeepSpeed can build what a run may need here: shared memory, CPU Adam")


def _toolkit(answers: Answers, seconds: float) -> Finding:
    """nvcc beside torch's CUDA: the ops for offloaded optimizers want the same major version."""
    wanted, home = answers["torch"].facts.get("cuda"), answers["ops"].facts.get("cuda_home")
    fix = f"install the CUDA {wanted} toolkit and set CUDA_HOME; needed only where the optimizer is offloaded"
    if home is None:
        return warning("CUDA toolkit", "there is none (no CUDA_HOME, no nvcc on PATH)", fix)
    ended = run_child([str(Path(home) / "bin" / "nvcc"), "--version"], seconds)
    release = re.search(r"release (\d+)\.(\d+)", ended.out)
    if ended.trouble is not None or release is None:
        return warning("CUDA toolkit", ended.trouble or "nvcc names no version", fix)
    found = f"{release[1]}.{release[2]}"
    if str(wanted).split(".")[0] != release[1]:
        return warning("CUDA toolkit", f"{found} in {home}, and torch is built for {wanted}", fix)
    return ok("CUDA toolkit", f"{found} in {home}; torch is built for {wanted}")


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    there = path.absolute()
    while not os.path.isdir(there):  # a Path raises where it may not look
        there = there.parent
    return there
