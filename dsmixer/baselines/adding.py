"""A method's own term on a model's projections, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dsmixer.model.inject import route_to

# x [T, D] -> what is added to the projection's output, [T, O]
Delta = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def adding(model: nn.Module, deltas: Mapping[str, Delta]) -> Iterator[None]:
    """Under it the model is its base, and each named projection adds its ``delta``.

    Args:
        model: a model with mixers attached, which are silent meanwhile.
        deltas: by module path, with or without a mixer there.
    """
    handles = []
    try:
        with route_to(model, None):
            for path, delta in deltas.items():
                handles.append(model.get_submodule(path).register_forward_hook(_hook(delta)))
            yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(delta: Delta) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    def add(_: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        (x, *_rest) = args
        return y + delta(x.reshape(-1, x.shape[-1])).to(y.dtype).reshape(y.shape)

    return add


def wide(x: torch.Tensor) -> torch.Tensor:
    """Float32, or float64 as it is: what gates are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lora_delta(a_RD: torch.Tensor, b_OR: torch.Tensor) -> Delta:
    """``B A x`` in the dtype of ``x``."""

    def delta(x_TD: torch.Tensor) -> torch.Tensor:
        h_TR = nn.functional.linear(x_TD, a_RD.to(x_TD.dtype))
        return nn.functional.linear(h_TR, b_OR.to(x_TD.dtype))

    return delta
