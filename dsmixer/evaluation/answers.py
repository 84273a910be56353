"""Answers to a list of requests, batched, each by its own expert, by the routers or by the base."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from dsmixer.evaluation.generation import padded_prompts
from dsmixer.evaluation.sharing import device_of
from dsmixer.model.inject import route_to
from dsmixer.routing.requests import Request

POSITIONS = "wpe|(embed_)?positions?(_embeddings?)?"
"""What models call the table of learned positions."""


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        prompt_ids: its tokens.
        to: an expert's name, None for the base, ``BY_ROUTERS``.
        max_new_tokens: longest answer, in tokens.
    """

    prompt_ids: Sequence[int]
    to: Request
    max_new_tokens: int


def learned_positions(model: nn.Module) -> int | None:
    """The most tokens that a model with an embedding for each position can read; None: it has no such end."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    found = any(
        isinstance(module, nn.Embedding) and re.fullmatch(POSITIONS, name.rpartition(".")[2])
        for name, module in model.named_modules()
    )
    return limit if found and isinstance(limit, int) else None


@torch.no_grad()
def answers(
    model: Any,
    asked: Sequence[Asked],
    *,
    batch_size: int,
    configured: Callable[[int], GenerationConfig],
) -> Iterator[list[int]]:
    """The tokens written for each request, in order, as its batch is done.

    A greedy answer is the one that the request alone gets, but for rounding; what is drawn depends on the
    batch.

    Args:
        model: in evaluation mode.
        asked: the requests.
        batch_size: rows that are decoded together.
        configured: how to write, given the longest answer of a batch.

    Yields:
        Tokens up to the request's own limit, its end token included.
    """
    for batch in _batches(asked, batch_size, learned_positions(model)):
        limits = [one.max_new_tokens for one in batch]
        config = configured(max(limits))
        given = padded_prompts(
            model, [one.prompt_ids for one in batch], config.pad_token_id, device_of(model)
        )
        with route_to(model, [one.to for one in batch]):
            output = model.generate(
                given.input_ids,
                attention_mask=given.attention_mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_OwnLimit(limits, given.written_from)]),
            )
        for row, limit in zip(output, limits, strict=True):
            written = row[given.written_from :][:limit].tolist()
            yield _until_end(written, config.eos_token_id)


def _batches(asked: Sequence[Asked], batch_size: int, positions: int | None) -> Iterator[list[Asked]]:
    """As many at a time as fit: a row that is done goes on being read until the longest of its batch is."""
    batch: list[Asked] = []
    for one in asked:
        longer = [*batch, one]
        read = max(len(each.prompt_ids) for each in longer) + max(each.max_new_tokens for each in longer) - 1
        if batch and (len(batch) == batch_size or (positions is not None and read > positions)):
            yield batch
            longer = [one]
        batch = longer
    if batch:
        yield batch


def _until_end(written: list[int], ends: int | list[int] | None) -> list[int]:
    """Without what pads a row after its end token."""
    closing = set(ends) if isinstance(ends, list) else {ends}
    for place, token in enumerate(written):
        if token in closing:
            return written[: place + 1]
    return written


class _OwnLimit(StoppingCriteria):
    """Ends a row at its own limit."""

    def __init__(self, limits: Sequence[int], written_from: int) -> None:
        self.limits, self.written_from = torch.tensor(limits), written_from

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return (self.limits <= input_ids.shape[1] - self.written_from).to(input_ids.device)
