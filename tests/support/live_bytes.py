"""The most bytes of tensors that were alive at once while something ran."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts memory that operations make inside it, from its making to its end; what was there before is not
    counted, nor what an operation makes for itself.

    Attributes:
        now: bytes alive.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, made=True)
        return out

    def _see(self, tree: Any, made: bool) -> None:
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor):
                continue
            memory = tensor.untyped_storage()
            key = memory._cdata
            if key not in self._seen:
                self._seen[key] = memory.nbytes() if made else 0
                self.now += self._seen[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(memory, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._seen.pop(key)
