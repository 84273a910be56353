"""``examples.json``: a few held-out texts, and who spoke at each of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmixer.config.errors import UserError
from dsmixer.report.json_file import read_json
from dsmixer.report.trace_data import TracedToken

EXAMPLES_FILE = "examples.json"


@dataclass(frozen=True)
class HeldOutText:
    """A stretch of one text.

    Attributes:
        domain, own_expert: names.
        tokens: of the stretch; ``routers`` of each is by layer.
        begin: of the stretch in the text, in tokens.
        num_tokens: of the whole text.
    """

    domain: str
    own_expert: str
    tokens: Sequence[TracedToken]
    begin: int
    num_tokens: int


@dataclass(frozen=True)
class HeldOutTexts:
    """The content of the file.

    Attributes:
        experts: names.
        layers: names of those told of.
        num_domains, num_layers: how many there are in all.
        texts: domain by domain.
    """

    experts: Sequence[str]
    layers: Sequence[str]
    num_domains: int
    num_layers: int
    texts: Sequence[HeldOutText]


def read_examples(path: Path) -> HeldOutTexts | None:
    """The file; None where a run has none.

    Raises:
        UserError: it is damaged.
    """
    value = read_json(path)
    if value is None:
        return None
    try:
        experts, layers = [str(name) for name in value["experts"]], [str(name) for name in value["layers"]]
        texts = [_text(text, experts, layers) for text in value["texts"]]
        counts = int(value["num_domains"]), int(value["num_layers"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        fix = "remove it to have a report without it"
        raise UserError(f"not the texts of a run: {error!r}", where=str(path), fix=fix) from None
    return HeldOutTexts(experts, layers, *counts, texts)


def _text(value: Mapping[str, Any], experts: Sequence[str], layers: Sequence[str]) -> HeldOutText:
    return HeldOutText(
        str(value["domain"]),
        str(value["own_expert"]),
        [_token(token, experts, layers) for token in value["tokens"]],
        int(value["begin"]),
        int(value["num_tokens"]),
    )


def _token(value: Mapping[str, Any], experts: Sequence[str], layers: Sequence[str]) -> TracedToken:
    number, text, part = int(value["id"]), str(value["text"]), str(value["part"])
    if value["weights"] is None:
        return TracedToken(number, text, part)
    weights = [0.0] * len(experts)
    for expert, weight in value["weights"]:
        weights[_index(expert, experts)] = float(weight)
    heard = {
        layer: [(experts[_index(expert, experts)], float(weight)) for expert, weight in pairs]
        for layer, pairs in zip(layers, value["layers"], strict=True)
        if pairs
    }
    return TracedToken(number, text, part, tuple(weights), float(value["entropy"]), heard)


def _index(expert: Any, experts: Sequence[str]) -> int:
    index = int(expert)
    if not 0 <= index < len(experts):
        raise IndexError(f"expert {index} of {len(experts)}")
    return index
