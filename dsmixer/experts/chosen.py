"""The chosen experts of a bank taken out, and their gradient put back.

Shapes: E experts, C chosen experts, ``[X, Y]`` the weights of one.
"""

from __future__ import annotations

import torch

CHOSEN_SHARE = 0.5
"""Of a bank: where more of it is named, it is taken whole, for the copies cost more than the rest."""


def take(bank_EXY: torch.Tensor, chosen_C: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The chosen experts of a bank in the dtype of the products, ``[C, X, Y]``; None: all of them."""
    return (bank_EXY if chosen_C is None else bank_EXY.index_select(0, chosen_C)).to(dtype)


def put(grad_CXY: torch.Tensor, chosen_C: torch.Tensor | None, bank_EXY: torch.Tensor) -> torch.Tensor:
    """The gradient of a bank from that of its chosen experts, ``[E, X, Y]``; the others' is zero."""
    grad_CXY = grad_CXY.to(bank_EXY.dtype)
    if chosen_C is None:
        return grad_CXY
    # where C is a bound, slots to spare name expert 0 with a gradient of zero: so they are added
    return empty_gradient(bank_EXY).index_add_(0, chosen_C, grad_CXY)


def empty_gradient(bank_EXY: torch.Tensor) -> torch.Tensor:
    """Zeros for a whole bank: the one pass of a form over the pool."""
    return torch.zeros_like(bank_EXY, memory_format=torch.contiguous_format)
