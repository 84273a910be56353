"""The rows that methods train on: tokenised once, the same for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsmixer.config.errors import UserError
from dsmixer.data.domains import Domain, capped
from dsmixer.data.encode import pad_token_id
from dsmixer.data.seeds import generator
from dsmixer.data.store import TokenStore
from dsmixer.data.tokenize import tokenize_examples


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """One row an example, as scoring has them.

    Attributes:
        store: the rows, with their domains' indices; only completions are targets.
        experts: the expert of each domain.
        pad_token_id: fills rows.
    """

    store: TokenStore
    experts: tuple[str, ...]
    pad_token_id: int

    @property
    def everything(self) -> list[int]:
        """All rows."""
        return list(range(len(self.store)))

    @property
    def served(self) -> list[str]:
        """The experts whose domains have rows, in the order of the domains."""
        there = np.unique(self.store.domain_ids).tolist()
        return list(dict.fromkeys(self.experts[domain] for domain in there))

    def of(self, expert: str) -> list[int]:
        """The rows of the domains that an expert serves.

        Raises:
            UserError: there are none.
        """
        domains = [index for index, name in enumerate(self.experts) if name == expert]
        rows: list[int] = np.flatnonzero(np.isin(self.store.domain_ids, domains)).tolist()
        if not rows:
            problem = f"no training rows for the expert {expert}, and each expert needs its own"
            raise UserError(problem, fix="give a domain with training rows for it, or leave the method out")
        return rows


def training_rows(
    domains: Sequence[Domain],
    tokenizer: Any,
    *,
    max_length: int,
    max_examples: int | None = None,
    seed: int = 0,
    decoder_start: int | None = None,
) -> TrainingRows:
    """Tokenise the domains' training examples as training does.

    Args:
        domains: those without training examples are left out.
        max_length: longest row, in tokens.
        max_examples: most examples a domain, drawn with ``seed``; None: all.
        decoder_start: the decoder's first token, of an encoder-decoder model; None: a decoder alone.

    Raises:
        UserError: there is no training example, or one can't be tokenised.
    """
    drawn = [capped(d.train, max_examples, generator(seed, "baselines", d.name)) for d in domains]
    examples = [example for of_domain in drawn for example in of_domain]
    if not examples:
        problem = "no domain has training examples"
        raise UserError(problem, where="data.domains", fix="give domains a train file")
    indices = [index for index, of_domain in enumerate(drawn) for _ in of_domain]
    store = tokenize_examples(
        examples, indices, tokenizer, max_length=max_length, decoder_start=decoder_start
    )
    return TrainingRows(store, tuple(domain.expert for domain in domains), pad_token_id(tokenizer))


def drawn_rows(rows: Sequence[int], count: int, seed: int, purpose: str) -> list[int]:
    """``count`` of the rows, or all where there are fewer, in an order of their own."""
    order = generator(seed, "baselines", purpose).permutation(len(rows))[:count]
    return [rows[i] for i in order]
