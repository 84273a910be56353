"""The pairs of a token and an expert in blocks of equal length, each of one expert: every product is one
batched product of torch, which is fast on any processor. What fills up a block has weight 0.

Shapes: T tokens, D input width, O output width, E experts, C chosen experts, R LoRA rank, K experts a token,
N pairs, B blocks, M rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsmixer.experts.chosen import CHOSEN_SHARE
from dsmixer.experts.pairs import Sorted

FILLED = 0.4
"""Share of the rows that have a pair, below which an expert's rows go into several blocks."""
DEVICE_BLOCK = 64
"""Rows of a block on a device, where the longest would have to be waited for."""


@dataclass(frozen=True)
class BlockedPairs:
    """Blocks of pairs in the order of their experts: ``Pairs``.

    Attributes:
        pair_I: of each row, its place in the flattened ``[T, K]``; T*K where it only fills up.
        token_I: of each row; where it only fills up, one that the expert hears, if it hears any.
        expert_I: of each row, E where it only fills up.
        place_TK: the row of each pair.
        expert_B: of each block, ascending; None: one block for each of all experts.
        num_blocks: B.
    """

    pair_I: torch.Tensor
    token_I: torch.Tensor
    expert_I: torch.Tensor
    place_TK: torch.Tensor
    expert_B: torch.Tensor | None
    num_blocks: int

    def take(self, bank_EXY: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.expert_B is None:
            return bank_EXY.to(dtype)
        if self.num_blocks < len(bank_EXY):
            return bank_EXY.index_select(0, self.expert_B).to(dtype)
        return bank_EXY.to(dtype).index_select(0, self.expert_B)

    def rows(self, x_TX: torch.Tensor) -> torch.Tensor:
        if not len(x_TX):  # there is one block, which only fills up
            return x_TX.new_zeros(len(self.token_I), x_TX.shape[1])
        return x_TX.index_select(0, self.token_I)

    def of_tokens(self, rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self._blocks(rows), matrices).flatten(0, 1)

    def to_tokens(self, left_IX: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        out_IY = self.of_tokens(left_IX, matrices)
        if not self.place_TK.numel():
            return out_IY.new_zeros(len(self.place_TK), out_IY.shape[1])
        return F.embedding_bag(self.place_TK, out_IY, mode="sum")

    def outer(self, left_IX: torch.Tensor, rows: torch.Tensor, bank_EXY: torch.Tensor) -> torch.Tensor:
        grad_BXY = torch.bmm(self._blocks(left_IX).transpose(1, 2), self._blocks(rows))
        grad_BXY = grad_BXY.to(bank_EXY.dtype)
        if self.expert_B is None:
            return grad_BXY
        # in a fixed order, unlike the atomic additions of a device's index_add_
        experts_E = torch.arange(len(bank_EXY), device=bank_EXY.device)
        firsts_E = torch.searchsorted(self.expert_B, experts_E)
        blocks_B = torch.arange(self.num_blocks, device=bank_EXY.device)
        return F.embedding_bag(blocks_B, grad_BXY.flatten(1), firsts_E, mode="sum").view(bank_EXY.shape)

    def _blocks(self, rows_IX: torch.Tensor) -> torch.Tensor:
        return rows_IX.view(self.num_blocks, -1, rows_IX.shape[1])


def blocked_pairs(ordered: Sorted) -> BlockedPairs:
    """Lay pairs out in blocks; those without an expert have the last row, of a block that only fills up."""
    expert_N, pair_N, num_experts = ordered.expert_N, ordered.pair_N, ordered.num_experts
    num_pairs, counts_E, device = len(expert_N), ordered.counts_E, expert_N.device
    length, blocks_E, spare = (_shape_here if ordered.seen else _shape_there)(counts_E, num_pairs)
    single = ordered.seen and not spare and bool((blocks_E == 1).all())
    ends_E = blocks_E.cumsum(0)
    num_blocks = spare + (int(ends_E[-1]) if ordered.seen else num_pairs // length + num_experts)
    blocks_B = torch.arange(num_blocks, device=device)
    expert_B = torch.searchsorted(ends_E, blocks_B, right=True).clamp_max_(num_experts - 1)
    starts_E, firsts_E = counts_E.cumsum(0) - counts_E, ends_E - blocks_E
    # of each row: the how manieth of its expert it is, and where that is in the sorted list
    count_B1 = counts_E[expert_B][:, None]
    inside_BM = (blocks_B - firsts_E[expert_B])[:, None] * length + torch.arange(length, device=device)
    filler_BM = inside_BM >= count_B1
    sorted_BM = torch.minimum(inside_BM, count_B1 - 1) + starts_E[expert_B][:, None]
    pair_BM = pair_N[sorted_BM.clamp_(0, num_pairs - 1)] if num_pairs else torch.zeros_like(sorted_BM)
    # of each pair: its row
    heard_N = expert_N.clamp_max(num_experts - 1)
    inside_N = torch.arange(num_pairs, device=device) - starts_E[heard_N]
    row_N = inside_N + firsts_E[heard_N] * length
    row_N = torch.where(expert_N == num_experts, num_blocks * length - 1, row_N)
    return BlockedPairs(
        pair_I=torch.where(filler_BM, num_pairs, pair_BM).flatten(),
        token_I=(pair_BM // max(1, ordered.shape[1])).flatten(),
        expert_I=torch.where(filler_BM, num_experts, expert_B[:, None]).flatten(),
        place_TK=torch.empty_like(pair_N).scatter_(0, pair_N, row_N).view(ordered.shape),
        expert_B=None if single else expert_B,
        num_blocks=num_blocks,
    )


def _shape_here(counts_E: torch.Tensor, num_pairs: int) -> tuple[int, torch.Tensor, int]:
    """Length of a block, blocks of each expert, and 1 where some pair has no expert, from the counts."""
    present, longest, num_chosen = int(counts_E.sum()), int(counts_E.max()), int((counts_E > 0).sum())
    spare, named_E = int(present < num_pairs or present == 0), (counts_E > 0).long()
    if present < FILLED * longest * num_chosen:
        length = -(-present // num_chosen)
        return length, -(-counts_E // length), spare
    # with a block for every expert, their weights need no copy
    every = num_chosen > CHOSEN_SHARE * len(counts_E)
    return max(1, longest), torch.ones_like(counts_E) if every else named_E, spare


def _shape_there(counts_E: torch.Tensor, num_pairs: int) -> tuple[int, torch.Tensor, int]:
    """The same where nothing can be waited for."""
    length = min(DEVICE_BLOCK, max(8, num_pairs // len(counts_E)))
    return length, -(-counts_E // length), 1
