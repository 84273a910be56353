"""What is measured, as a value that travels to every process: the shapes of one line of the table.

Shapes: T tokens, D input width of a projection, O its output width, E experts, R LoRA rank, K experts a
token. No torch here: the process that leads the bench needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

TARGETS = ("q", "k", "v", "o")
BYTES = {"float32": 4.0, "bfloat16": 2.0, "nf4": 0.516}
"""Bytes of a weight of the base; NF4 with double quantisation has 0.127 bits of scales beside its four."""


@dataclass(frozen=True)
class Case:
    """One base, one pool of experts, one kind of work.

    Attributes:
        what: ``train``, whole steps, or ``decode``, one more token for each row.
        width: of the hidden states; the feed-forward has 3.5 times as many, a key-value head serves four.
        layers: of the Llama.
        experts: E.
        rank: R of each expert.
        rows: B.
        sequence: tokens a row in a training step; tokens of the prompt in decoding.
        dtype: of the base: ``float32``, ``bfloat16`` or ``nf4`` (computing in bfloat16).
        device: ``cpu`` or ``cuda``.
        vocabulary: small, so that few layers weigh as much as they do in a deep model.
        top_k: K.
        domains_a_row: stretches of a training row, each of another domain, for hard routing.
    """

    what: str
    width: int
    layers: int
    experts: int
    rank: int
    rows: int = 1
    sequence: int = 1024
    dtype: str = "float32"
    device: str = "cpu"
    vocabulary: int = 2048
    top_k: int = 3
    domains_a_row: int = 4

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Case:
        return cls(**values)

    @property
    def head_dim(self) -> int:
        return 128 if self.width >= 4096 else 64

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 4)

    @property
    def intermediate(self) -> int:
        return self.width * 7 // 2

    @property
    def tokens(self) -> int:
        """Of one training step, or that one decoding step puts out."""
        return self.rows * (self.sequence if self.what == "train" else 1)

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """D and O of what carries experts, by role."""
        kv = self.kv_heads * self.head_dim
        wide = (self.width, self.width)
        return {"q": wide, "k": (self.width, kv), "v": (self.width, kv), "o": wide}

    @property
    def expert_weights(self) -> int:
        """Of one expert, over all layers."""
        return self.layers * self.rank * sum(D + O for D, O in self.projections.values())

    @property
    def router_weights(self) -> int:
        """Of all routers, one a projection."""
        return self.layers * self.experts * sum(D for D, _ in self.projections.values())

    @property
    def linear_weights(self) -> int:
        """Of the base's matrix products, the one before the vocabulary among them."""
        a_layer = sum(D * O for D, O in self.projections.values()) + 3 * self.width * self.intermediate
        return self.layers * a_layer + self.width * self.vocabulary

    def title(self) -> str:
        """One line."""
        seen = f"{self.rows} x {self.sequence} tokens" if self.what == "train" else f"{self.rows} rows"
        return (
            f"{self.what}, {self.device}, {self.dtype}, width {self.width}, {self.layers} layers, "
            f"E={self.experts}, r={self.rank}, {seen}"
        )
