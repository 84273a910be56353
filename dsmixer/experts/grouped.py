"""The pairs of a token and an expert sorted by expert, each expert's rows multiplied by its own two matrices.

Shapes: T tokens, D input width, O output width, E experts, C chosen experts, R LoRA rank, K experts a token,
N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsmixer.experts.chosen import CHOSEN_SHARE, put, take
from dsmixer.experts.pairs import Sorted


@dataclass(frozen=True)
class SortedPairs:
    """The pairs in the order of their experts: ``Pairs``.

    Attributes:
        pair_I: their places in the flattened ``[T, K]``.
        expert_I: the expert of each, E for none.
        top_k: K.
        num_tokens: T.
        chosen_C: the experts, int64; None: all of the bank.
        ends_C: where the pairs of each expert end, int32.
    """

    pair_I: torch.Tensor
    expert_I: torch.Tensor
    top_k: int
    num_tokens: int
    chosen_C: torch.Tensor | None
    ends_C: torch.Tensor

    def take(self, bank_EXY: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return take(bank_EXY, self.chosen_C, dtype)

    def rows(self, x_TX: torch.Tensor) -> torch.Tensor:
        return x_TX.index_select(0, self.pair_I // self.top_k)

    def of_tokens(self, rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return _grouped_mm(rows, matrices, self.ends_C)

    def to_tokens(self, left_IX: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        out_IY = _grouped_mm(left_IX, matrices, self.ends_C)
        if not len(out_IY):
            return out_IY.new_zeros(self.num_tokens, out_IY.shape[1])
        place_I = torch.argsort(self.pair_I)
        firsts_T = torch.arange(self.num_tokens, device=out_IY.device) * self.top_k
        starts_T = torch.searchsorted(self.pair_I.index_select(0, place_I), firsts_T)
        return F.embedding_bag(place_I, out_IY, starts_T, mode="sum")

    def outer(self, left_IX: torch.Tensor, rows: torch.Tensor, bank_EXY: torch.Tensor) -> torch.Tensor:
        return put(_grouped_outer(left_IX, rows, self.ends_C), self.chosen_C, bank_EXY)


def sorted_pairs(ordered: Sorted) -> SortedPairs:
    """Lay the pairs out one after the other.

    Those without an expert are left out on the CPU; on a device their number is not known, and they go with
    the last expert, at their scaling of zero. The same with the number of experts that are named: on a device
    the number of pairs is a bound for it. The whole bank is taken where most of it is named.
    """
    expert_N, pair_N, num_experts = ordered.expert_N, ordered.pair_N, ordered.num_experts
    num_chosen = len(expert_N)
    if ordered.seen:
        present, num_chosen = int(ordered.counts_E.sum()), int((ordered.counts_E > 0).sum())
        expert_N, pair_N = expert_N[:present], pair_N[:present]
    slot_N, chosen_C = expert_N.clamp_max(num_experts - 1), None
    if num_chosen <= num_experts * CHOSEN_SHARE:
        chosen_C, slot_N = _number(slot_N, num_chosen)
    slots_C = torch.arange(num_experts if chosen_C is None else num_chosen, device=slot_N.device)
    ends_C = torch.searchsorted(slot_N, slots_C, right=True, out_int32=True)
    num_tokens, top_k = ordered.shape
    return SortedPairs(pair_N, expert_N, top_k, num_tokens, chosen_C, ends_C)


def _number(expert_N: torch.Tensor, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The different experts of a sorted list, ``[C]``, and for each entry its place among them, ``[N]``."""
    new_N = torch.ones_like(expert_N)
    new_N[1:] = expert_N[1:] != expert_N[:-1]
    slot_N = new_N.cumsum(0) - 1
    return expert_N.new_zeros(num_chosen).scatter_(0, slot_N, expert_N), slot_N


def _grouped_mm(rows_NX: torch.Tensor, weights_EXY: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """``rows[i] @ weights[expert of i]`` for rows sorted by expert, ``[N, Y]``."""
    if _has_grouped_kernel(rows_NX, *weights_EXY.shape[1:]):
        return F.grouped_mm(rows_NX.contiguous(), weights_EXY, offs=ends_E)
    out_NY = rows_NX.new_empty(rows_NX.shape[0], weights_EXY.shape[2])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        out_NY[start:end] = rows_NX[start:end] @ weights_EXY[e]
        start = end
    return out_NY


def _grouped_outer(left_NX: torch.Tensor, right_NY: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """``sum over an expert's rows of left_i right_i^T``, ``[E, X, Y]``; zero where it has none."""
    if _has_grouped_kernel(left_NX, left_NX.shape[1], right_NY.shape[1]):
        return F.grouped_mm(left_NX.contiguous().T, right_NY.contiguous(), offs=ends_E)
    out_EXY = left_NX.new_zeros(ends_E.shape[0], left_NX.shape[1], right_NY.shape[1])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        out_EXY[e] = left_NX[start:end].T @ right_NY[start:end]
        start = end
    return out_EXY


def _has_grouped_kernel(rows_NX: torch.Tensor, *widths: int) -> bool:
    """``F.grouped_mm`` takes float32 and bfloat16, rows of whole 16 bytes, and at least one row."""
    if rows_NX.dtype not in (torch.float32, torch.bfloat16) or rows_NX.shape[0] == 0:
        return False
    return all(width * rows_NX.element_size() % 16 == 0 for width in widths)
