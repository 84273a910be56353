"""Which experts this rank holds: a value that everything below the plan can be given."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertLayout:
    """Experts over the ranks of an expert-parallel group.

    Attributes:
        owned: experts of each rank of the group, by their index in the pool. Each expert has one owner in
            a group and no rank is without one; ``EP = len(owned)``.
        rank: this rank in its group.
    """

    owned: tuple[tuple[int, ...], ...]
    rank: int = 0

    def __post_init__(self) -> None:
        held = sorted(expert for experts in self.owned for expert in experts)
        assert held == list(range(len(held))), "each expert has exactly one owner in a group"
        assert all(self.owned), "every rank of a group holds an expert"

    @property
    def size(self) -> int:
        """EP, ranks over which the pool is spread."""
        return len(self.owned)

    @property
    def num_experts(self) -> int:
        """E."""
        return sum(len(experts) for experts in self.owned)

    @property
    def local(self) -> tuple[int, ...]:
        """The experts of this rank, in the order of its banks."""
        return self.owned[self.rank]

    def owner_and_place(self) -> tuple[list[int], list[int]]:
        """For each expert the rank that holds it and its index there."""
        owner, place = [0] * self.num_experts, [0] * self.num_experts
        for rank, experts in enumerate(self.owned):
            for index, expert in enumerate(experts):
                owner[expert], place[expert] = rank, index
        return owner, place


def everything_here(num_experts: int) -> ExpertLayout:
    """Every expert on every rank."""
    return ExpertLayout((tuple(range(num_experts)),))
