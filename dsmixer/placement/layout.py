"""Which experts this rank holds: a value that everything below the plan can be given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class ExpertLayout:
    """Experts over the ranks of an expert-parallel group.

    Attributes:
        owned: experts of each rank of the group, by their index in the pool. Each expert has an
            owner in a group, a large one may have several, and no rank is without one; ``EP = len(owned)``.
        rank: this rank in its group.
    """

    owned: tuple[tuple[int, ...], ...]
    rank: int = 0

    def __post_init__(self) -> None:
        held = {expert for experts in self.owned for expert in experts}
        assert held == set(range(len(held))), "each expert has an owner in a group"
        assert all(self.owned), "every rank of a group holds an expert"
        assert all(len(set(experts)) == len(experts) for experts in self.owned)

    @property
    def size(self) -> int:
        """EP, ranks over which the pool is spread."""
        return len(self.owned)

    @cached_property
    def num_experts(self) -> int:
        """E."""
        return len(self.owners)

    @property
    def local(self) -> tuple[int, ...]:
        """The experts of this rank, in the order of its banks."""
        return self.owned[self.rank]

    @cached_property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """For each expert the ranks that hold it."""
        found: dict[int, list[int]] = {}
        for rank, experts in enumerate(self.owned):
            for expert in experts:
                found.setdefault(expert, []).append(rank)
        return tuple(tuple(found[expert]) for expert in sorted(found))

    @cached_property
    def several(self) -> tuple[int, ...]:
        """The experts with several owners, whose gradients are added up among them."""
        return tuple(expert for expert, ranks in enumerate(self.owners) if len(ranks) > 1)

    @cached_property
    def counted(self) -> tuple[bool, ...]:
        """For each local expert whether this rank is its first owner, the one that speaks for it in sums."""
        return tuple(map(self.speaks_for, self.local))

    def speaks_for(self, expert: int) -> bool:
        """Whether this rank is an expert's first owner."""
        return self.owners[expert][0] == self.rank

    def destination_and_place(self) -> tuple[list[int], list[int]]:
        """For each expert the rank to which this one sends its tokens, and the expert's index there.

        Of several owners that is this rank itself if it is one, or else one by this rank's number, so that
        the owners share the work.
        """
        ranks = [
            self.rank if self.rank in owners else owners[self.rank % len(owners)] for owners in self.owners
        ]
        return ranks, [self.owned[rank].index(expert) for expert, rank in enumerate(ranks)]


def everything_here(num_experts: int) -> ExpertLayout:
    """Every expert on every rank."""
    return ExpertLayout((tuple(range(num_experts)),))
