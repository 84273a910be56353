"""Log-likelihoods of completions, and the figures that follow from them.

The forward passes work on a live model inside a DeepSpeed engine, ZeRO-3 included: every rank makes the
same number of them. Sums are taken in float64 and over ranks at the end, so that neither the number of
ranks nor the batches enter the result.

Shapes: M rows, B rows of a batch, S positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dsmixer.data.collate import MicroBatch, collate
from dsmixer.evaluation.sharing import batches_of, dealt, device_of, summed
from dsmixer.evaluation.sheet import Sheet
from dsmixer.losses.task import IGNORED, target_losses

Row = dict[str, object]
BatchContext = Callable[[MicroBatch], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class RowScores:
    """What a method gives to each row; 0 for rows that were not scored.

    Attributes:
        nll: float64 ``[M]``, minus log-likelihood of the completion and its end of sequence, nats.
        text_nll: float64 ``[M]``, the same without the end of sequence.
    """

    nll: np.ndarray
    text_nll: np.ndarray


@torch.no_grad()
def score_rows(
    model: nn.Module,
    sheet: Sheet,
    rows: Sequence[int],
    *,
    batch_size: int,
    pad_token_id: int,
    end_token_id: int | None,
    around: BatchContext | None = None,
    tick: Callable[[], None] | None = None,
) -> RowScores:
    """Score some rows of a sheet with the model as it is routed now.

    Args:
        model: in evaluation mode; called by every rank, with the same rows.
        rows: which rows.
        batch_size: rows a forward pass; padded on the right, which no causal model looks at, and masked in
            an encoder.
        end_token_id: the end of sequence that closes completions, None where the tokenizer has none.
        around: a context for each forward pass, as the routing analysis wants it.
        tick: called after each forward pass.

    Returns:
        the scores, the same on every rank.
    """
    device = device_of(model)
    batches = batches_of(rows, sheet.store.lengths.tolist(), batch_size)
    sums_M2 = torch.zeros(len(sheet.store), 2, dtype=torch.float64)
    for batch in dealt(batches):
        micro = collate(sheet.store, [(row,) for row in batch] or [()], pad_token_id).to(device)
        with around(micro) if around is not None else nullcontext():
            losses_BS, targets_BS = completion_losses(model, micro)
        if batch:
            sums_M2[batch] = _row_sums(losses_BS, targets_BS, end_token_id).cpu()
        if tick is not None:
            tick()
    total_M2 = summed(sums_M2, device).numpy()
    return RowScores(total_M2[:, 0], total_M2[:, 1])


def completion_losses(model: nn.Module, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the positions from the batch's first target on, and their targets, ``[B, S']``.

    Prompts need no logits: with a large vocabulary those are most of the memory.
    """
    targets_BS = micro.targets
    is_target_S = (targets_BS != IGNORED).any(0)
    first = int(is_target_S.int().argmax()) if bool(is_target_S.any()) else targets_BS.shape[1] - 1
    keep = targets_BS.shape[1] - first
    options = {"logits_to_keep": keep} if _can_keep(model) else {}
    given = micro.inputs()
    given.pop("position_ids", None)  # a row is one example here, and not every model takes them
    logits_BSV = model(**given, use_cache=False, **options).logits
    targets_BS = targets_BS[:, -keep:]
    return target_losses(logits_BSV[:, -keep:], targets_BS), targets_BS


def _can_keep(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _row_sums(losses_BS: torch.Tensor, targets_BS: torch.Tensor, end_token_id: int | None) -> torch.Tensor:
    """Summed losses of each row, with and without the end of sequence, ``[B, 2]`` float64."""
    losses_BS = losses_BS.double()
    last_B = (targets_BS != IGNORED).long().cumsum(1).argmax(1, keepdim=True)
    ends_B = targets_BS.gather(1, last_B) == (IGNORED if end_token_id is None else end_token_id)
    nll_B = losses_BS.sum(1)
    end_nll_B = (losses_BS.gather(1, last_B) * ends_B).squeeze(1)
    return torch.stack([nll_B, nll_B - end_nll_B], dim=1)


def domain_rows(sheet: Sheet, scores: RowScores, method: str, domains: Collection[int]) -> list[Row]:
    """The figures of one method: ``loss`` of each domain, ``accuracy`` and ``accuracy_norm`` with choices.

    ``loss`` is the mean over all target tokens of a domain, nats. A choice is taken by the sum of its
    log-likelihood (``accuracy``), or by that sum per byte of the choice (``accuracy_norm``), in both cases
    without the end of sequence.
    """
    found: list[Row] = []
    for domain in domains:
        name = sheet.domains[domain]
        right = np.array([row for row in sheet.rows([domain]) if sheet.is_target_row[row]])
        loss = scores.nll[right].sum() / sheet.store.target_counts[right].sum()
        found.append(row_of(name, method, "loss", loss, len(right)))
        chosen = _chosen(sheet, scores, domain)
        if chosen:
            for metric, hits in zip(("accuracy", "accuracy_norm"), zip(*chosen, strict=True), strict=True):
                found.append(row_of(name, method, metric, float(np.mean(hits)), len(hits)))
    return found


def _chosen(sheet: Sheet, scores: RowScores, domain: int) -> list[tuple[bool, bool]]:
    """For each example with choices: whether the sum and the sum per byte pick the answer."""
    rows_of: dict[int, list[int]] = {}
    for row in sheet.rows([domain]):
        if sheet.choice_of_row[row] >= 0:
            rows_of.setdefault(int(sheet.example_of_row[row]), []).append(row)
    hits = []
    for index, rows in rows_of.items():
        example = sheet.examples[index]
        assert example.choices is not None and len(example.choices) == len(rows)
        sizes = np.array([len(choice.encode()) for choice in example.choices])
        nll = scores.text_nll[rows]
        hits.append((int(nll.argmin()) == example.answer, int((nll / sizes).argmin()) == example.answer))
    return hits


def majority_rows(sheet: Sheet) -> list[Row]:
    """The share of each domain's most frequent answer: what a constant reaches in ``accuracy``."""
    found: list[Row] = []
    for domain, name in enumerate(sheet.domains):
        indices = dict.fromkeys(int(sheet.example_of_row[row]) for row in sheet.rows([domain]))
        answers = [sheet.examples[i].answer for i in indices if sheet.examples[i].choices is not None]
        if answers:
            share = max(answers.count(answer) for answer in set(answers)) / len(answers)
            found.append(row_of(name, "majority", "accuracy", share, len(answers)))
    return found


def row_of(domain: str, method: str, metric: str, value: float, num_examples: int) -> Row:
    """One line of ``evaluation.json``."""
    return {
        "domain": domain,
        "method": method,
        "metric": metric,
        "value": float(value),
        "num_examples": int(num_examples),
    }
