"""Several methods scored on one sheet, each beside what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dsmixer.baselines.interface import Fitted, Given, Method
from dsmixer.data.encode import pad_token_id
from dsmixer.evaluation.generation import exact_match_rows, match_rows
from dsmixer.evaluation.methods import BATCH_SIZE
from dsmixer.evaluation.scoring import Row, domain_rows, score_rows
from dsmixer.evaluation.sharing import device_of
from dsmixer.evaluation.sheet import Sheet


@dataclass(frozen=True)
class Compared:
    """What a comparison came to.

    Attributes:
        rows: domain, method, metric, value, num_examples, as in ``evaluation.json``.
        costs: by method, ``trainable`` weights, ``steps``, ``told`` (whether it is told the domain),
            ``seconds`` to make it ready, ``seconds_per_example`` of scoring, ``peak_memory`` (bytes;
            None on a CPU), and what it ``found``.
        fitted: the methods themselves, ready to answer.
    """

    rows: list[Row]
    costs: dict[str, dict[str, Any]]
    fitted: dict[str, Fitted]


def evaluate_methods(
    given: Given,
    tokenizer: Any,
    sheet: Sheet,
    chosen: Mapping[str, Method],
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Compared:
    """Make methods ready one after the other and score each as the mixture itself is scored.

    Args:
        given: the experts, the rows to train on, the seed.
        tokenizer: the model's.
        sheet: the held-out examples.
        chosen: methods by the name that their rows get, such as part of ``registry.methods``.
        batch_size: rows a forward pass.
        max_new_tokens: longest written answer where exact match is wanted; None: it is not.
        progress: told the name of each method as its turn comes.

    Returns:
        rows and costs. A method that is told the domain has rows for the domains it can be told of.

    Raises:
        UserError: a method can't work with these experts or rows.
    """
    rows: list[Row] = []
    costs: dict[str, dict[str, Any]] = {}
    fitted: dict[str, Fitted] = {}
    model = given.mixture.model
    was_training = model.training
    model.eval()
    try:
        for name, method in chosen.items():
            if progress is not None:
                progress(name)
            began = time.perf_counter()
            with peak_memory(device_of(model)) as peak:
                ready = fitted[name] = method(given)
                costs[name] = _cost(ready, time.perf_counter() - began)
                scored = [
                    _rows(model, tokenizer, sheet, name, asked, ready.under(own), batch_size, max_new_tokens)
                    for own, asked in _asked(ready, sheet)
                ]
            rows += [row for found, _, _ in scored for row in found]
            num_examples = sum(count for _, _, count in scored)
            costs[name]["seconds_per_example"] = sum(s for _, s, _ in scored) / max(1, num_examples)
            costs[name]["peak_memory"] = peak.get("bytes")
    finally:
        model.train(was_training)
    return Compared(rows, costs, fitted)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """A dictionary that has, in the end, the most ``bytes`` of tensors on a GPU; of a CPU it stays empty."""
    found: dict[str, int] = {}
    if device.type != "cuda":
        yield found
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    found["bytes"] = torch.cuda.max_memory_allocated(device)


def _cost(fitted: Fitted, seconds: float) -> dict[str, Any]:
    return {
        "trainable": fitted.num_trainable,
        "steps": fitted.num_steps,
        "told": fitted.told is not None,
        "seconds": seconds,
        "found": dict(fitted.found),
    }


def _asked(fitted: Fitted, sheet: Sheet) -> list[tuple[str, list[int]]]:
    """What a method is told, and the domains it is then asked."""
    if fitted.told is None:
        return [("", list(range(len(sheet.domains))))]
    experts = enumerate(sheet.own_experts)
    return [(expert, [domain]) for domain, expert in experts if expert in fitted.told]


def _rows(
    model: Any,
    tokenizer: Any,
    sheet: Sheet,
    name: str,
    domains: Sequence[int],
    under: AbstractContextManager[None],
    batch_size: int,
    max_new_tokens: int | None,
) -> tuple[list[Row], float, int]:
    """The rows, the seconds that scoring took, and how many rows of the sheet it scored."""
    pad, rows = pad_token_id(tokenizer), sheet.rows(domains)
    with under:
        began = time.perf_counter()
        scores = score_rows(
            model,
            sheet,
            rows,
            batch_size=batch_size,
            pad_token_id=pad,
            end_token_id=tokenizer.eos_token_id,
        )
        seconds = time.perf_counter() - began
        found = domain_rows(sheet, scores, name, domains)
        free = sheet.free_rows(domains) if max_new_tokens is not None else []
        if not free or max_new_tokens is None:
            return found, seconds, len(rows)
        matched = match_rows(
            model,
            tokenizer,
            sheet,
            free,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
        )
    return found + exact_match_rows(sheet, matched, name, domains), seconds, len(rows)
