"""A traced text as plain values: its tokens, and which experts spoke at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OTHER = "*"


@dataclass(frozen=True)
class TracedToken:
    """One token.

    Attributes:
        id: in the vocabulary.
        text: what it adds to the text; empty inside a letter of several tokens.
        part: ``prompt`` or ``answer``.
        weights: of each expert, mean over the mixers that read the token; None where none did: the last token
            is written and never read.
        entropy: of the routers' probabilities, mean over the mixers, nats; None likewise.
        routers: by module path, the experts that spoke there with their weights, the loudest first.
    """

    id: int
    text: str
    part: str
    weights: tuple[float, ...] | None = None
    entropy: float | None = None
    routers: Mapping[str, Sequence[tuple[str, float]]] | None = None

    @cached_property
    def leader(self) -> int | None:
        """The expert with the largest mean weight."""
        if self.weights is None:
            return None
        return max(range(len(self.weights)), key=lambda e: self.weights[e])  # type: ignore[index]


@dataclass(frozen=True)
class Trace:
    """A prompt, its answer, and who spoke.

    Attributes:
        name: of the mixture.
        experts: names, in the order of the weights.
        routers: module paths.
        tokens: of the prompt and of the answer.
    """

    name: str
    experts: Sequence[str]
    routers: Sequence[str]
    tokens: Sequence[TracedToken]

    def mean_weights(self) -> list[float]:
        """Of each expert, over the tokens that were read."""
        read = [token.weights for token in self.tokens if token.weights is not None]
        return [sum(column) / len(read) for column in zip(*read, strict=True)] if read else []

    def led(self) -> list[int]:
        """How many tokens each expert leads."""
        leaders = [token.leader for token in self.tokens]
        return [leaders.count(e) for e in range(len(self.experts))]

    def order(self) -> list[int]:
        """The experts, those with the largest mean weight first."""
        means = self.mean_weights() or [0.0] * len(self.experts)
        return sorted(range(len(self.experts)), key=lambda e: (-means[e], e))

    def symbols(self) -> list[str]:
        """A capital letter for each of the loudest experts, in the order of ``experts``; ``*`` for others."""
        found = [OTHER] * len(self.experts)
        for symbol, expert in zip(SYMBOLS, self.order(), strict=False):
            found[expert] = symbol
        return found


def visible(text: str) -> str:
    """Text on one line: line ends and tabs as signs, and what a terminal would obey escaped."""
    signs = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(
        signs.get(sign) or (sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii"))
        for sign in text
    )
