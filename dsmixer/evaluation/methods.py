"""The methods that are compared, and the whole evaluation of a mixture."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from torch import nn

from dsmixer.data.domains import Domain
from dsmixer.data.encode import pad_token_id
from dsmixer.evaluation.generation import exact_match_rows, match_rows
from dsmixer.evaluation.routing_analysis import RoutingCounts, recorder, routing_report
from dsmixer.evaluation.scoring import Row, domain_rows, majority_rows, score_rows
from dsmixer.evaluation.sharing import device_of, unwrapped, world
from dsmixer.evaluation.sheet import Sheet, make_sheet
from dsmixer.model.inject import Mixture, mixture_of, route_by, route_to
from dsmixer.model.streams import decoder_start
from dsmixer.routing.modes import Routing

MAX_FULL_MATRIX = 16  # experts up to which each is scored on every domain

# (method, passes done, passes in all)
Progress = Callable[[str, int, int], None]

BATCH_SIZE = 8
"""Rows a forward pass, where nothing says how many."""

KINDS = ("base", "experts", "uniform", "mixture")
"""What is scored where nobody chooses."""

STAGE_ONE = "@stage1"
"""Ends the name of an expert as it was before stage two, and of all of them: ``experts@stage1``."""


class EvaluationSettings(Protocol):
    """What ``EvaluationConfig`` of a recipe has, and all that is needed of it."""

    @property
    def max_examples(self) -> int | None: ...
    @property
    def generate_max_new_tokens(self) -> int: ...
    @property
    def exact_match(self) -> bool: ...
    @property
    def batch_size(self) -> int | None: ...


@dataclass(frozen=True)
class Method:
    """One way to answer.

    Attributes:
        name: ``base``, ``expert:NAME``, ``uniform``, ``mixture`` or ``expert:NAME@stage1``.
        domains: indices of the domains it is scored on.
    """

    name: str
    domains: tuple[int, ...]


def methods_of(mixture: Mixture, sheet: Sheet, kinds: Collection[str] = KINDS) -> list[Method]:
    """Base, experts, uniform, trained mixture, and experts before stage two, of those that ``kinds`` names.

    Above 16 experts each one on its own domains only.
    """
    everywhere = tuple(range(len(sheet.domains)))
    is_full = len(mixture.expert_names) <= MAX_FULL_MATRIX
    experts = []
    for expert in mixture.expert_names:
        own = tuple(g for g in everywhere if sheet.own_experts[g] == expert)
        if is_full or own:
            experts.append(Method(f"expert:{expert}", everywhere if is_full else own))
    known = {name: [Method(name, everywhere)] for name in ("base", "uniform", "mixture")}
    known["experts"] = experts
    known[f"experts{STAGE_ONE}"] = [Method(f"{m.name}{STAGE_ONE}", m.domains) for m in experts]
    return [method for kind in (*KINDS, f"experts{STAGE_ONE}") if kind in kinds for method in known[kind]]


@contextmanager
def routed_as(model: nn.Module, method: str) -> Iterator[None]:
    """Route a model with mixers as a method says.

    ``expert:NAME@stage1`` is routed to the expert that the model has now.
    """
    if method == "base":
        chosen = route_to(model, None)
    elif method.startswith("expert:"):
        chosen = route_to(model, method.removeprefix("expert:").removesuffix(STAGE_ONE))
    elif method == "uniform":
        chosen = route_by(model, Routing(mode="uniform"))
    else:
        assert method == "mixture", method
        chosen = route_by(model, mixture_of(model).config.default_routing())
    with chosen:
        yield


def evaluate_mixture(
    model: nn.Module,
    tokenizer: Any,
    domains: Sequence[Domain],
    settings: EvaluationSettings,
    *,
    max_length: int = 1024,
    seed: int = 0,
    kinds: Collection[str] = KINDS,
    stage_one: AbstractContextManager[None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a mixture and what it is compared with on the domains' test examples.

    Every rank calls this; every rank gets the same result.

    Args:
        model: a transformers model with mixers, or the DeepSpeed engine around it.
        tokenizer: the model's.
        domains: those without test examples are left out.
        settings: ``EvaluationConfig`` of a recipe.
        max_length: longest row, in tokens, as in training.
        seed: draws ``settings.max_examples``.
        kinds: what is scored, of ``KINDS`` and ``experts@stage1``.
        stage_one: a context under which the experts are as they were before stage two; None: as they are.
        progress: told after each forward pass of this rank.

    Returns:
        ``rows``: domain, method, metric, value, num_examples; ``routing``: see ``routing_report``, None where
        the mixture is not scored; ``recovered``: by domain, (base - mixture) / (base - own expert) in loss,
        None where the own expert is not better than the base, absent where one of the three is not scored;
        ``own_experts``: the expert of each domain.

    Raises:
        UserError: there is nothing to score, or an example can't be tokenised.
    """
    model = unwrapped(model)
    mixture = mixture_of(model)
    sheet = make_sheet(
        domains,
        tokenizer,
        max_length=max_length,
        max_examples=settings.max_examples,
        seed=seed,
        decoder_start=decoder_start(getattr(model, "config", None)),
    )
    counts = RoutingCounts(mixture, sheet.own_experts, device_of(model))
    was_training = model.training
    model.eval()
    rows = majority_rows(sheet)
    methods = methods_of(mixture, sheet, kinds)
    try:
        for is_before, group in groupby(methods, lambda method: method.name.endswith(STAGE_ONE)):
            with stage_one if is_before and stage_one is not None else nullcontext():
                for method in group:
                    around = recorder(mixture, sheet, counts) if method.name == "mixture" else None
                    with routed_as(model, method.name):
                        rows += _method_rows(model, tokenizer, sheet, method, settings, around, progress)
    finally:
        model.train(was_training)
    over_ranks = counts.over_ranks(device_of(model))
    is_routed = any(method.name == "mixture" for method in methods)
    return {
        "rows": rows,
        "routing": routing_report(mixture, sheet, *over_ranks) if is_routed else None,
        "recovered": recovered(rows, sheet),
        "own_experts": dict(zip(sheet.domains, sheet.own_experts, strict=True)),
    }


def _method_rows(
    model: nn.Module,
    tokenizer: Any,
    sheet: Sheet,
    method: Method,
    settings: EvaluationSettings,
    around: Any,
    progress: Progress | None,
) -> list[Row]:
    rows, free = sheet.rows(method.domains), sheet.free_rows(method.domains)
    free = free if settings.exact_match else []
    batch_size = settings.batch_size or BATCH_SIZE
    return scored_rows(
        model,
        tokenizer,
        sheet,
        method.name,
        method.domains,
        batch_size=batch_size,
        max_new_tokens=settings.generate_max_new_tokens if settings.exact_match else None,
        around=around,
        tick=_ticker(method.name, [rows, free], batch_size, progress),
    )[0]


def scored_rows(
    model: nn.Module,
    tokenizer: Any,
    sheet: Sheet,
    name: str,
    domains: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int | None,
    around: Any = None,
    tick: Callable[[], None] | None = None,
) -> tuple[list[Row], float]:
    """The rows of one method on some domains, with the model as it answers now.

    Args:
        name: of the method, in its rows.
        domains: indices of the domains.
        batch_size: rows a forward pass.
        max_new_tokens: longest written answer where exact match is wanted; None: it is not.
        around, tick: as ``score_rows`` has them.

    Returns:
        Rows as in ``evaluation.json``, and the seconds that scoring took, without written answers.
    """
    pad, began = pad_token_id(tokenizer), time.perf_counter()
    scores = score_rows(
        model,
        sheet,
        sheet.rows(domains),
        batch_size=batch_size,
        pad_token_id=pad,
        end_token_id=tokenizer.eos_token_id,
        around=around,
        tick=tick,
    )
    seconds = time.perf_counter() - began
    found = domain_rows(sheet, scores, name, domains)
    free = sheet.free_rows(domains) if max_new_tokens is not None else []
    if not free or max_new_tokens is None:
        return found, seconds
    matched = match_rows(
        model,
        tokenizer,
        sheet,
        free,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        tick=tick,
    )
    return found + exact_match_rows(sheet, matched, name, domains), seconds


def _ticker(
    method: str, parts: Collection[Sequence[int]], batch_size: int, progress: Progress | None
) -> Callable[[], None] | None:
    if progress is None:
        return None
    per_pass = batch_size * world()[1]
    total = sum(-(-len(part) // per_pass) for part in parts)
    done = iter(range(1, total + 1))
    return lambda: progress(method, next(done), total)


def recovered(rows: Sequence[Row], sheet: Sheet) -> dict[str, float | None]:
    """The share of the own expert's gain in loss that the mixture recovers without being told the domain."""
    loss = {(r["domain"], r["method"]): float(r["value"]) for r in rows if r["metric"] == "loss"}  # type: ignore[arg-type]
    shares: dict[str, float | None] = {}
    for name, expert in zip(sheet.domains, sheet.own_experts, strict=True):
        keys = [(name, method) for method in ("base", "mixture", f"expert:{expert}")]
        if all(key in loss for key in keys):
            base, mixture, own = (loss[key] for key in keys)
            shares[name] = (base - mixture) / (base - own) if base > own else None
    return shares
