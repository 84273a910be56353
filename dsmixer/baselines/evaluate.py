"""Several methods scored on one sheet, each beside what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dsmixer.baselines.interface import Fitted, Given, Method
from dsmixer.evaluation.methods import BATCH_SIZE, scored_rows
from dsmixer.evaluation.scoring import Row
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
                found, each = _answered(model, tokenizer, sheet, name, ready, batch_size, max_new_tokens)
            rows += found
            costs[name]["seconds_per_example"] = each
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


def _answered(
    model: Any,
    tokenizer: Any,
    sheet: Sheet,
    name: str,
    ready: Fitted,
    batch_size: int,
    max_new_tokens: int | None,
) -> tuple[list[Row], float]:
    """The rows of a method on all domains that it answers, and the seconds that scoring an example took."""
    rows: list[Row] = []
    seconds, num_rows = 0.0, 0
    for own_expert, domains in _asked(ready, sheet):
        with ready.under(own_expert):
            found, took = scored_rows(
                model,
                tokenizer,
                sheet,
                name,
                domains,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
            )
        rows += found
        seconds, num_rows = seconds + took, num_rows + len(sheet.rows(domains))
    return rows, seconds / max(1, num_rows)
