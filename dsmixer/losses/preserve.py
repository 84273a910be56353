"""The pull that holds experts near their stage-one values.

    L_preserve = beta * sum_{i in C} ||theta_i - theta_i(0)||^2

Its gradient is ``2 beta (theta - theta(0))``, known without a backward pass, so the optimizer adds it to
the partitions it holds: no gathered bank, no copy of theta(0) beyond the partition, and no scale that
depends on how many ranks hold an expert.
"""

from __future__ import annotations

import torch


def preserve_term(
    weights: torch.Tensor, origin: torch.Tensor, beta_rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient and value of the term on a block of rows.

    Args:
        weights: theta, ``[rows, width]``.
        origin: theta(0), ``[rows, width]``.
        beta_rows: beta of each row, ``[rows, 1]``; 0 for rows that are not held.

    Returns:
        the gradient ``[rows, width]`` and the value of each row, ``[rows]``.
    """
    moved = weights - origin
    pulled = beta_rows * moved
    return 2.0 * pulled, (pulled * moved).sum(1)
