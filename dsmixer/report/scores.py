"""An evaluation that can be asked: what a method reached on a domain, and how much of a gain it recovers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EXPERT = "expert:"
OWN = "own expert"
AS_STAGE_ONE_LEFT_IT = "@stage1"  # behind an expert's name, as a method
OWN_BEFORE = "own expert after stage one"
METHOD_ORDER = ("base", "majority", OWN_BEFORE, OWN, "uniform", "mixture")
METRIC_ORDER = ("loss", "accuracy", "accuracy_norm", "exact_match")


def lower_is_better(metric: str) -> bool:
    """Whether a small value of a metric is a good one: losses, perplexities, bits, Brier scores."""
    return any(part in metric for part in ("loss", "perplexity", "bits_per_byte", "brier"))


@dataclass(frozen=True)
class Scores:
    """The rows of ``evaluation.json``.

    Attributes:
        values: by (domain, method, metric); ``expert:NAME`` is a method.
        num_examples: by (domain, metric).
        domains: in the order of the recipe; what it does not name, in that of the losses.
        expert_of: name of the expert that serves a domain.
    """

    values: dict[tuple[str, str, str], float]
    num_examples: dict[tuple[str, str], int]
    domains: list[str]
    expert_of: dict[str, str]

    @property
    def metrics(self) -> list[str]:
        return _ordered({metric for _, _, metric in self.values}, METRIC_ORDER)

    @property
    def experts(self) -> list[str]:
        """Experts that were measured, in the order of the domains they serve, then by name."""
        methods = {method for _, method, _ in self.values if _group(method) == OWN}
        names = {method.removeprefix(EXPERT) for method in methods}
        return _ordered(names, [self.expert_of[domain] for domain in self.domains])

    def methods(self, metric: str) -> list[str]:
        """Columns of a metric's table: every method, the experts drawn together as ``own expert``."""
        names = {method for _, method, other in self.values if other == metric}
        return _ordered({_group(method) for method in names}, METHOD_ORDER)

    def value(self, domain: str, method: str, metric: str) -> float:
        """The value, NaN where it was not measured; ``own expert`` is the domain's own."""
        if method in (OWN, OWN_BEFORE):
            method = f"{EXPERT}{self.expert_of[domain]}{AS_STAGE_ONE_LEFT_IT if method == OWN_BEFORE else ''}"
        return self.values.get((domain, method, metric), math.nan)

    def mean(self, method: str, metric: str) -> float:
        """Mean over the domains of the metric; NaN where one of them was not measured."""
        domains = [domain for domain in self.domains if (domain, metric) in self.num_examples]
        return (
            float(np.mean([self.value(domain, method, metric) for domain in domains]))
            if domains
            else math.nan
        )

    def share_of_own_gain(self, domain: str, method: str) -> float:
        """``(base - method) / (base - own expert)`` in held-out loss; NaN where the own one gains none."""
        base, own = self.value(domain, "base", "loss"), self.value(domain, OWN, "loss")
        return (base - self.value(domain, method, "loss")) / (base - own) if base > own else math.nan

    def gain(self, domain: str, method: str) -> float:
        """Held-out loss below the base, nats a target token."""
        return self.value(domain, "base", "loss") - self.value(domain, method, "loss")


def scores_of(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Scores:
    """Scores from the rows of ``evaluation.json`` and the settings, which say what expert serves a domain."""
    values: dict[tuple[str, str, str], float] = {}
    num_examples: dict[tuple[str, str], int] = {}
    for row in rows:
        domain, method, metric = (str(row[key]) for key in ("domain", "method", "metric"))
        value, number = row["value"], row.get("num_examples")
        values[domain, method, metric] = float(value) if isinstance(value, int | float) else math.nan
        num_examples[domain, metric] = number if isinstance(number, int) else 0
    named = _named(settings)
    # majorities stand before the losses in the rows, and only some domains have one
    losses = [domain for domain, _, metric in values if metric == "loss"]
    measured = dict.fromkeys(domain for domain, _, _ in values)
    domains = _ordered(set(measured), [*named, *losses, *measured])
    return Scores(values, num_examples, domains, {name: named.get(name) or name for name in domains})


def _named(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """The recipe's domains in its order, with the experts that it names for them."""
    data = settings.get("data")
    entries = data.get("domains") if isinstance(data, Mapping) else None
    if not isinstance(entries, list):
        return {}
    found = {str(entry.get("name")): entry.get("expert") for entry in entries if isinstance(entry, Mapping)}
    return {name: str(expert) if expert else None for name, expert in found.items()}


def _group(method: str) -> str:
    """The column of a method: experts stand together."""
    if not method.startswith(EXPERT):
        return method
    return OWN_BEFORE if method.endswith(AS_STAGE_ONE_LEFT_IT) else OWN


def _ordered(names: set[str], first: Sequence[str]) -> list[str]:
    leading = [name for name in dict.fromkeys(first) if name in names]
    return leading + sorted(names - set(leading))
