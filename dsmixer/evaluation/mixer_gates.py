"""Mixers of a live model taken out for a while, turned down, or measured.

Shapes: T tokens, D input width of a projection, O its output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from dsmixer.model.inject import Mixture
from dsmixer.routing.context import Stream


@contextmanager
def without(mixture: Mixture, paths: Iterable[str]) -> Iterator[None]:
    """Projections that answer as those of the base: their routers and experts are not even asked.

    Args:
        mixture: on a live model.
        paths: module paths of the mixers that are taken out.
    """
    taken = [mixture.mixers[path] for path in paths]
    for mixer in taken:
        # over the method of the class, and what calls the projection finds the same module
        setattr(mixer, "forward", mixer.base.__call__)  # noqa: B010
    try:
        yield
    finally:
        for mixer in taken:
            del mixer.forward


@contextmanager
def gated(mixture: Mixture, value: float) -> Iterator[dict[str, torch.Tensor]]:
    """``y = W0 x + g sum_e w_e s_e B_e A_e x`` with a ``g`` for each mixer, in whose place gradients arise.

    Args:
        mixture: on a live model, all experts on this process.
        value: of every g; 1 is the mixture, 0 the base.

    Yields:
        the scalars g by module path, leaves of the graph.
    """
    gates: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for path, mixer in mixture.mixers.items():
            gates[path] = torch.tensor(value, device=mixer.bank.lora_A.device, requires_grad=True)
            handle = mixer.bank.register_forward_hook(_scaled_by(gates[path]))
            stack.callback(handle.remove)
        yield gates


def _scaled_by(gate: torch.Tensor) -> Callable[..., torch.Tensor]:
    def hook(_: Any, __: Any, out_TO: torch.Tensor) -> torch.Tensor:
        return out_TO * gate.to(out_TO.dtype)

    return hook


class Squares:
    """Sums of squares over real tokens of what each mixer's experts and its base put out.

    Attributes:
        real_T: by stream, which tokens of the present pass are no padding; to be set before each pass.
        experts: sum of squares of the experts' weighted sums by module path, float64.
        base: the same of the frozen projections' outputs.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.real_T: Mapping[Stream, torch.Tensor] = {}
        self.experts = dict.fromkeys(paths, 0.0)
        self.base = dict(self.experts)

    def adding(self, sums: dict[str, float], path: str, stream: Stream) -> Callable[..., None]:
        """A forward hook that adds one module's output to ``sums[path]``."""

        def hook(_: Any, __: Any, out: torch.Tensor) -> None:
            out_TO = out.detach().reshape(-1, out.shape[-1])[self.real_T[stream]]
            sums[path] += float(out_TO.double().square().sum())

        return hook


@contextmanager
def measured(mixture: Mixture) -> Iterator[Squares]:
    """While it is open, the sizes of what mixers and their bases put out are summed."""
    squares = Squares(mixture.mixers)
    with ExitStack() as stack:
        for path, mixer in mixture.mixers.items():
            for module, sums in ((mixer.bank, squares.experts), (mixer.base, squares.base)):
                hook = squares.adding(sums, path, mixer.stream)
                stack.callback(module.register_forward_hook(hook).remove)
        yield squares
