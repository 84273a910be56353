"""The small mixed set that trains the routers, kept from stage one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dsmixer.config.errors import UserError
from dsmixer.config.schema import RouterDataConfig
from dsmixer.data.domains import BadRecords, Domain, capped, read_examples
from dsmixer.data.records import Example
from dsmixer.data.seeds import generator

UNLABELLED = ""
"""The domain of a router example that comes from a source of its own: stage two needs no labels."""


def hold_out_router_examples(
    domains: Sequence[Domain],
    data: RouterDataConfig,
    seed: int,
    *,
    on_bad_record: Literal["error", "skip"] = "error",
    quarantine: Path | None = None,
) -> tuple[list[Domain], list[Example], int]:
    """Split the router's training examples off the domains, or read them from their own source.

    Held out are numbers proportional to the domains' train sizes, at least one a domain and at most
    ``max_share`` of each (or one). Which ones depends on the seed and the domain's name alone. Where
    ``held_out`` says how many these are, the router examples are the first ``max_examples`` of them in
    ``nested_order``.

    Args:
        domains: the domains with all their training examples.
        data: the recipe's ``stage2.data``.
        seed: the run's seed.
        on_bad_record: the recipe's ``data.on_bad_record``, for the routers' own source.
        quarantine: file that skipped records are added to; None: they are only counted.

    Returns:
        The domains for stage one and the router examples, both in source order, and the number of records
        of the routers' own source that were skipped.

    Raises:
        UserError: a domain has a single example, or the source is empty or bad.
    """
    if data.source is not None:
        bad = BadRecords(skip=on_bad_record == "skip")
        examples = _examples_of_source(data.source, data.max_examples, seed, bad, quarantine)
        return list(domains), examples, len(bad.entries)
    for domain in domains:
        if len(domain.train) < 2:
            fix = "add examples, or give stage2.data.source"
            problem = f"{len(domain.train)} training example, none to spare for the routers"
            raise UserError(problem, where=f"data.domains: {domain.name}", fix=fix)
    wanted = data.max_examples if data.held_out is None else data.held_out
    counts = held_out_counts([len(domain.train) for domain in domains], wanted, data.max_share)
    remaining: list[Domain] = []
    kept: list[list[Example]] = []
    for domain, count in zip(domains, counts, strict=True):
        random = generator(seed, "router examples", domain.name)
        chosen = set(random.choice(len(domain.train), count, replace=False).tolist())
        kept.append([example for i, example in enumerate(domain.train) if i in chosen])
        train = [example for i, example in enumerate(domain.train) if i not in chosen]
        remaining.append(dataclasses.replace(domain, train=train))
    if data.held_out is not None and data.max_examples < data.held_out:
        first = set(nested_order([domain.name for domain in domains], counts, seed)[: data.max_examples])
        kept = [[e for i, e in enumerate(own) if (g, i) in first] for g, own in enumerate(kept)]
    return remaining, [example for of_domain in kept for example in of_domain], 0


def nested_order(names: Sequence[str], counts: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """All held-out examples, as domain and place among the domain's own, in one order drawn with the seed.

    The first n, for any n, hold the domains in the proportions of ``counts``, one of each before a second
    of any: of a domain with m of M examples about ``n m / M``.

    Args:
        names: of the domains.
        counts: held-out examples of each.
        seed: the run's.
    """
    places: list[tuple[float, float, int, int]] = []
    for g, (name, count) in enumerate(zip(names, counts, strict=True)):
        random = generator(seed, "router order", name)
        tie = float(random.random())
        places += [(rank / count, tie, g, int(i)) for rank, i in enumerate(random.permutation(count))]
    return [(g, i) for _, _, g, i in sorted(places)]


def held_out_counts(sizes: Sequence[int], max_examples: int, max_share: float) -> list[int]:
    """How many examples each domain gives: largest remainders of the proportional shares, within the caps.

    Args:
        sizes: training examples a domain, each at least two.
        max_examples: wanted over all domains; exceeded only where one a domain needs it.
        max_share: largest share of a domain.
    """
    size = np.asarray(sizes, dtype=np.int64)
    caps = np.maximum(1, np.floor(max_share * size).astype(np.int64))
    shares = max_examples * size / size.sum()
    counts = np.clip(np.floor(shares).astype(np.int64), 1, caps)
    for i in np.argsort(np.floor(shares) - shares, kind="stable"):
        if counts.sum() >= max_examples:
            break
        counts[i] += int(counts[i] < caps[i] and shares[i] > counts[i])
    return [int(count) for count in counts]


def _examples_of_source(
    source: str, max_examples: int, seed: int, bad: BadRecords, quarantine: Path | None
) -> list[Example]:
    rows = read_examples(source, "train", None, "auto", bad, domain=UNLABELLED)
    examples = capped(rows, max_examples, generator(seed, "router source"))
    if quarantine is not None:
        _add_to_quarantine(bad, quarantine)
    if not examples:
        problem = f"no example in it ({len(bad.entries)} bad records were skipped)"
        raise UserError(problem, where=f"stage2.data.source: {source}", fix="give it records")
    return examples


def _add_to_quarantine(bad: BadRecords, path: Path) -> None:
    # BadRecords.write begins the file anew, and the domains' records may be in it
    if not path.exists():
        bad.write(path)
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in bad.entries)
    except OSError as error:
        raise UserError(f"cannot write the quarantine file: {error}", where=str(path)) from error
