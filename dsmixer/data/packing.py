"""Several examples a row, so that little of a row is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OPEN_ROWS = 64


def pack(lengths: np.ndarray, order: Sequence[int] | np.ndarray, max_length: int) -> list[tuple[int, ...]]:
    """Put examples into rows of at most ``max_length`` tokens, first fit over a window of open rows.

    Linear in the examples: an example looks at 64 open rows at most, and where none has room the fullest one
    is closed. The same arguments give the same rows.

    Args:
        lengths: tokens of every example in the store, ``[N]``, none above ``max_length``.
        order: indices of the examples to pack, in the order in which they are placed; repeats are allowed.
        max_length: tokens a row holds.

    Returns:
        Rows of example indices, in the order in which they were opened.
    """
    rows: list[list[int]] = []
    room = np.full(OPEN_ROWS, -1, dtype=np.int64)
    row_of_slot = [-1] * OPEN_ROWS
    order = np.asarray(order, dtype=np.int64)
    for example, length in zip(order.tolist(), np.asarray(lengths)[order].tolist(), strict=True):
        assert 0 < length <= max_length, f"example {example} has {length} tokens, a row {max_length}"
        slot = int((room >= length).argmax())
        if room[slot] < length:
            slot = int(room.argmin())
            row_of_slot[slot], room[slot] = len(rows), max_length
            rows.append([])
        rows[row_of_slot[slot]].append(example)
        room[slot] -= length
    return [tuple(row) for row in rows]
