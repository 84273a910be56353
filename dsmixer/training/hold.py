"""A step's gradients, looked at once: the preserve term's pull added, and their norms.

Shapes: N rows, X elements each.
"""

from __future__ import annotations

import torch

from dsmixer.experts.host import can_multiply, pull_rows
from dsmixer.losses.preserve import add_preserve

IN_CACHE = 2**18
"""Elements of a gradient that are read again while a processor's cache still holds them."""


def hold_rows(
    grad_NX: torch.Tensor, held: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the preserve term's gradient in place, and measure what there is.

    On the CPU one pass of a kernel; without kernels torch's operations, on blocks that a cache holds.

    Args:
        grad_NX: of everything else.
        held: theta and theta(0), like it, and beta of each row, ``[N]``; None: there is no such term.

    Returns:
        of each row, the squared norm of its whole gradient, and the value of the term; ``[N]`` float32.
    """
    on_host = grad_NX.device.type == "cpu"
    if on_host and can_multiply(grad_NX.dtype) and grad_NX.dtype == torch.float32:
        away = None if held is None else (held[0], held[1], 2.0 * held[2])
        squares_N, moves_N = pull_rows(grad_NX, away)
        return squares_N, moves_N if held is None else moves_N * held[2]
    at_once = max(1, IN_CACHE // grad_NX.shape[1]) if on_host else max(1, len(grad_NX))
    found = []
    for first in range(0, len(grad_NX), at_once):
        grad, *some = (of[first : first + at_once] for of in (grad_NX, *(held or ())))
        values = add_preserve(grad, some[0], some[1], some[2][:, None]) if some else grad.new_zeros(len(grad))
        found.append((torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32).square_(), values))
    norms, values_N = zip(*found, strict=True)
    return torch.cat(norms), torch.cat(values_N)
