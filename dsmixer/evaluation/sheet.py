"""The texts of an evaluation, tokenised once for all methods."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from dsmixer.config.errors import UserError
from dsmixer.data.domains import Domain, capped
from dsmixer.data.records import Example
from dsmixer.data.seeds import generator
from dsmixer.data.store import TokenStore
from dsmixer.data.tokenize import tokenize_examples


@dataclass(frozen=True, eq=False)
class Sheet:
    """N examples as M rows of tokens: one row an example, or one row a choice where there are choices.

    Attributes:
        domains: names of the domains that have test examples.
        own_experts: the expert of each of them.
        examples: the N examples.
        store: the M rows, with the domain's index; only completions are targets.
        example_of_row: int64 ``[M]``.
        choice_of_row: int64 ``[M]``, the choice's index, -1 where there are none.
    """

    domains: tuple[str, ...]
    own_experts: tuple[str, ...]
    examples: tuple[Example, ...]
    store: TokenStore
    example_of_row: np.ndarray
    choice_of_row: np.ndarray

    @cached_property
    def is_target_row(self) -> np.ndarray:
        """Bool ``[M]``: rows with the right completion, which count for the loss."""
        answers = np.array([-1 if e.choices is None else e.answer for e in self.examples], dtype=np.int64)
        right: np.ndarray = self.choice_of_row == answers[self.example_of_row]
        return right

    def rows(self, domains: Collection[int]) -> list[int]:
        """The rows of some domains."""
        return np.flatnonzero(np.isin(self.store.domain_ids, list(domains))).tolist()

    def free_rows(self, domains: Collection[int]) -> list[int]:
        """The rows of some domains whose answers are not chosen but written."""
        return [row for row in self.rows(domains) if self.choice_of_row[row] < 0]


def make_sheet(
    domains: Sequence[Domain],
    tokenizer: Any,
    *,
    max_length: int,
    max_examples: int | None,
    seed: int = 0,
    decoder_start: int | None = None,
) -> Sheet:
    """Tokenise the domains' test examples as training does its own.

    Args:
        domains: those without test examples are left out.
        max_length: longest row, in tokens.
        max_examples: most examples a domain, drawn with ``seed``; None: all.
        decoder_start: the decoder's first token, of an encoder-decoder model; None: a decoder alone.

    Raises:
        UserError: no domain has a test example, or one can't be tokenised.
    """
    tested = [domain for domain in domains if domain.test]
    if not tested:
        raise UserError("no domain has test examples", where="data.domains", fix="give domains a test file")
    examples: list[Example] = []
    rows: list[Example] = []
    of_row: list[tuple[int, int, int]] = []  # domain, example, choice
    for index, domain in enumerate(tested):
        for example in capped(domain.test, max_examples, generator(seed, "evaluate", domain.name)):
            for choice, row in _rows(example):
                rows.append(row)
                of_row.append((index, len(examples), choice))
            examples.append(example)
    columns = np.array(of_row, dtype=np.int64)
    store = tokenize_examples(
        rows,
        columns[:, 0],
        tokenizer,
        max_length=max_length,
        loss="completion",
        decoder_start=decoder_start,
    )
    return Sheet(
        tuple(domain.name for domain in tested),
        tuple(domain.expert for domain in tested),
        tuple(examples),
        store,
        columns[:, 1],
        columns[:, 2],
    )


def _rows(example: Example) -> list[tuple[int, Example]]:
    if example.choices is None:
        return [(-1, example)]
    return [
        (i, replace(example, completion=choice, choices=None, answer=None))
        for i, choice in enumerate(example.choices)
    ]
