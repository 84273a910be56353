"""Files as ``torch.save`` writes them, whose pickles ask for what nobody needs who only wants tensors."""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Calls:
    """Pickled as a call of a function, by the names of its module and itself."""

    def __init__(self, module: str, name: str, *arguments: Any, state: Any = None) -> None:
        self.module, self.name, self.arguments, self.state = module, name, arguments, state


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python lets opcodes be written
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Calls):
            super().save(obj, save_persistent_id)
            return
        self.write(f"c{obj.module}\n{obj.name}\n".encode())
        super().save(tuple(obj.arguments))
        self.write(pickle.REDUCE)
        if obj.state is not None:
            super().save(obj.state)
            self.write(pickle.BUILD)


class _Module:
    """What ``torch.save`` takes for the pickle module."""

    Pickler = _Pickler

    @staticmethod
    def dumps(obj: Any, protocol: int) -> bytes:
        return pickle.dumps(obj, protocol)


def saved(path: Path, value: Any) -> None:
    """``torch.save``, with calls in it."""
    torch.save(value, path, pickle_module=_Module, pickle_protocol=2)


def harmful(path: Path, mark: Path) -> None:
    """A pickle that would leave a mark if it were executed."""
    saved(path, {"weight": Calls("os", "system", f"touch {mark}")})


def lie(path: Path, change: tuple[bytes, bytes]) -> None:
    """Change the pickle in an archive of weights, where it speaks of the first of them."""
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    before, after = change
    name = next(name for name in records if name.endswith("data.pkl"))
    assert before in records[name], (before, records[name])
    records[name] = records[name].replace(before, after, 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for record, data in records.items():
            file.writestr(record, data)


def _call(module: str, name: str, *arguments: Any) -> Callable[[Path, Path], None]:
    """A value that is a call; ``MARK`` in an argument is the file that would be written."""

    def write(path: Path, mark: Path) -> None:
        real = [a.replace("MARK", str(mark)) if isinstance(a, str) else a for a in arguments]
        saved(path, {"weight": Calls(module, name, *real)})

    return write


def _value(make: Callable[[Calls], Any]) -> Callable[[Path, Path], None]:
    """A value that holds a call somewhere."""
    return lambda path, mark: saved(path, make(Calls("os", "system", f"touch {mark}")))


def _plain(make: Callable[[], Any]) -> Callable[[Path, Path], None]:
    """A value that executes nothing and is no weight either."""
    return lambda path, mark: torch.save(make(), path)


def _bare(path: Path, mark: Path) -> None:
    """A pickle by itself, as ``torch.save`` wrote them long ago."""
    path.write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())


def _legacy(path: Path, mark: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def _script(path: Path, mark: Path) -> None:
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(module, path)


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


WRITE = "open('MARK', 'w').write('owned')"
PICKLES: dict[str, Callable[[Path, Path], None]] = {
    "os.system": _call("os", "system", "touch MARK"),
    "posix.system": _call("posix", "system", "touch MARK"),
    "os.popen": _call("os", "popen", "touch MARK"),
    "os.mkdir": _call("os", "mkdir", "MARK"),
    "os.execv": _call("os", "execv", "/usr/bin/touch", ["touch", "MARK"]),
    "subprocess.Popen": _call("subprocess", "Popen", "touch MARK"),
    "subprocess.check_output": _call("subprocess", "check_output", ["touch", "MARK"]),
    "builtins.eval": _call("builtins", "eval", WRITE),
    "builtins.exec": _call("builtins", "exec", WRITE),
    "builtins.open": _call("builtins", "open", "MARK", "w"),
    "builtins.__import__": _call("builtins", "__import__", "antigravity"),
    "builtins.getattr": _call("builtins", "getattr", Calls("builtins", "__import__", "os"), "system"),
    "builtins.compile": _call("builtins", "compile", WRITE, "x", "exec"),
    "builtins.bytearray of all memory": _call("builtins", "bytearray", 2**60),
    "importlib": _call("importlib", "import_module", "antigravity"),
    "runpy": _call("runpy", "run_path", "MARK"),
    "shutil.rmtree": _call("shutil", "rmtree", "MARK"),
    "pathlib": _call("pathlib", "Path.touch", "MARK"),
    "pickle.loads": _call("pickle", "loads", b"cos\nsystem\n(S'true'\ntR."),
    "pty.spawn": _call("pty", "spawn", "touch"),
    "ctypes": _call("ctypes", "CDLL", "libc.so.6"),
    "functools.partial": _call("functools", "partial", Calls("builtins", "eval", WRITE)),
    "operator.attrgetter": _call("operator", "attrgetter", "system"),
    "types.CodeType": _call("types", "CodeType", 0),
    "socket": _call("socket", "create_connection", ["127.0.0.1", 9]),
    "webbrowser": _call("webbrowser", "open", "file://MARK"),
    "torch.load": _call("torch", "load", "MARK"),
    "torch.hub": _call("torch.hub", "load", "MARK", "x"),
    "torch.save": _call("torch", "save", 1, "MARK"),
    "torch.collect_env": _call("torch.utils.collect_env", "run", "touch MARK"),
    "torch.jit": _call("torch.jit", "load", "MARK"),
    "torch.classes": _call("torch.classes", "load_library", "MARK"),
    "torch internals": _call("torch._utils", "_rebuild_tensor_v2", "MARK"),
    "numpy": _call("numpy", "save", "MARK", 1),
    "a dotted name": _call("os", "path.os.system", "touch MARK"),
    "a name of no module": _call("no.such.module", "f", 1),
    "a call in a list": _value(lambda call: {"a": [1, [2, call]]}),
    "a call as a key": _value(lambda call: {(call,): torch.ones(1)}),
    "a call beside weights": _value(lambda call: {"a": torch.ones(2, 2), "b": call}),
    "a call alone": _value(lambda call: call),
    "a call in a state": _value(
        lambda call: {"a": Calls("collections", "OrderedDict", state={"__class__": call})}
    ),
    "a module": _plain(lambda: torch.nn.Linear(2, 2)),
    "a list": _plain(lambda: [torch.ones(2, 2)]),
    "an integer": _plain(lambda: 7),
    "text": _plain(lambda: {"a": "text"}),
    "lists, deep": _plain(lambda: {"a": _deep(200)}),
    "names that are numbers": _plain(lambda: {7: torch.ones(2, 2)}),
    "a counter": _plain(lambda: collections.Counter("aab")),
    "a dictionary in a dictionary": _plain(lambda: {"state_dict": {"a": torch.ones(2, 2)}}),
    "a sparse tensor": _plain(lambda: {"a": torch.eye(4).to_sparse()}),
    "a tensor in compressed rows": _plain(lambda: {"a": torch.eye(4).to_sparse_csr()}),
    "a quantised tensor": _plain(
        lambda: {"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}
    ),
    "a tensor without a place": _plain(lambda: {"a": torch.ones(4, device="meta")}),
    "complex numbers": _plain(lambda: {"a": torch.ones(2, 2, dtype=torch.complex64)}),
    "a bare pickle": _bare,
    "the form of long ago": _legacy,
    "a script": _script,
}
