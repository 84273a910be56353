"""How many copies of a token travel in stage two, where tokens choose their experts evenly.

A token goes once to each rank that holds one of its K experts, and one partial sum comes back. A rank sends
the tokens of m_d experts to rank d; K of E experts drawn without repetition name one of those with chance

    f(m) = 1 − C(E − m, K) / C(E, K)

so that a token of this rank has K̂ = Σ f(m_d) copies, over the *other* ranks d of its group. Where each expert
has one owner and every rank as many, K̂ = (EP − 1) · f(E / EP), which in a large pool is
EP · (1 − (1 − 1/EP)^K) · (EP − 1)/EP. Of an expert with several owners these keep their own tokens, and the
others choose one of them by their number (``ExpertLayout.destination_and_place``): K̂ is lower.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from dsmixer.placement.owners import Owners


@dataclass(frozen=True)
class Copies:
    """Copies of a token, on average, for each rank of a group.

    Attributes:
        sent: that a token of this rank sends to others.
        received: that a token of every other rank sends here, together.
        kept: share of this rank's tokens with an expert here.
    """

    sent: tuple[float, ...]
    received: tuple[float, ...]
    kept: tuple[float, ...]

    def moved(self, rank: int) -> float:
        """What a rank sends out and back, for each token of a micro-batch: half of both passes."""
        return (self.sent[rank] + self.received[rank]) / 2

    @property
    def most_moved(self) -> float:
        """K̂, of the rank that sends most; where all hold as many experts, of every rank."""
        return max(map(self.moved, range(len(self.sent))))

    def arriving(self, rank: int) -> float:
        """Tokens that a rank's experts work on, for each token of a micro-batch."""
        return self.received[rank] + self.kept[rank]


@lru_cache(maxsize=256)
def copies_of(owners: Owners, top_k: int) -> Copies:
    """The copies between the ranks of a group.

    Args:
        owners: of the experts.
        top_k: K; E where every expert answers every token.
    """
    size, num_experts = len(owners.loads), len(owners.parts)
    ranks_of = [tuple(rank for rank, _ in parts) for parts in owners.parts]
    alone = Counter(ranks[0] for ranks in ranks_of if len(ranks) == 1)
    shared = [ranks for ranks in ranks_of if len(ranks) > 1]
    by_alone = [named_share(num_experts, alone[rank], top_k) for rank in range(size)]
    total = sum(by_alone)
    sent, kept = [], []
    received = [total_of_others * (size - 1) for total_of_others in by_alone]
    for rank in range(size):
        more = Counter(rank if rank in ranks else ranks[rank % len(ranks)] for ranks in shared)
        out = total - by_alone[rank]
        for other, count in more.items():
            if other != rank:
                extra = named_share(num_experts, alone[other] + count, top_k) - by_alone[other]
                out += extra
                received[other] += extra
        sent.append(out)
        kept.append(named_share(num_experts, alone[rank] + more[rank], top_k))
    return Copies(tuple(sent), tuple(received), tuple(kept))


@lru_cache(maxsize=4096)
def named_share(num_experts: int, held: int, top_k: int) -> float:
    """f(m): the probability that K of E experts name one of m."""
    missed = 1.0
    for drawn in range(top_k):
        missed *= max(0, num_experts - held - drawn) / (num_experts - drawn)
        if not missed:
            break
    return 1.0 - missed
