"""The pull that holds experts near their stage-one values.

    L_preserve = beta * sum_{i in C} ||theta_i - theta_i(0)||^2

Its gradient is ``2 beta (theta - theta(0))``, known without a backward pass, so the optimizer adds it to
the partitions it holds: no gathered bank, no copy of theta(0) beyond the partition, and no scale that
depends on how many ranks hold an expert.
"""

from __future__ import annotations

import torch


def add_preserve(
    gradient: torch.Tensor, weights: torch.Tensor, origin: torch.Tensor, beta_rows: torch.Tensor
) -> torch.Tensor:
    """Add the term's gradient on a block of rows in place.

    Args:
        gradient: of everything else, ``[rows, width]``.
        weights: theta, ``[rows, width]``.
        origin: theta(0), ``[rows, width]``.
        beta_rows: beta of each row, ``[rows, 1]``; 0 for rows that are not held.

    Returns:
        the value of each row, ``[rows]``.
    """
    moved = weights - origin
    values = torch.linalg.vector_norm(moved, dim=1).square_() * beta_rows.squeeze(1)
    gradient.add_(moved.mul_(2.0 * beta_rows))
    return values
