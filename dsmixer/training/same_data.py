"""Whether all ranks have read the same data: their order decides who trains on what."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NoReturn

from dsmixer.config.errors import UserError
from dsmixer.training.data import RunData, StageData
from dsmixer.training.world import World, gather_objects


def check_same_data(world: World, data: RunData) -> None:
    """As many examples of every domain on every rank; a collective.

    Raises:
        UserError: names the domains that differ; on every rank.
    """
    counts = {domain.name: (len(domain.train), len(domain.test)) for domain in data.domains}
    every = gather_objects(world, counts)
    if any(list(other) != list(counts) for other in every):
        _refuse("not the same domains")
    _refuse_others(every)


def check_same_tokens(world: World, data: RunData, tokens: Mapping[int, StageData]) -> None:
    """The same texts, tokens and order of steps on every rank; a collective.

    What the tokens were made from is known by the digests of the stores; texts are read through again only
    where those differ, to say which domain it is.

    Raises:
        UserError: names the domains that differ; on every rank.
    """
    orders = gather_objects(world, {number: stage.sampler.state(0) for number, stage in tokens.items()})
    if all(other == orders[0] for other in orders):
        return
    _refuse_others(gather_objects(world, _digests(data)))
    _refuse("the same texts, and other tokens or another order of steps")


def _digests(data: RunData) -> dict[str, str]:
    """Of the texts of each domain, those for the routers included; one for router data of no domain."""
    digests = {name: hashlib.sha256() for name in (*data.domain_names, "router data")}
    for example in chain(*(domain.train for domain in data.domains), data.router_examples):
        name = example.domain if example.domain in digests else "router data"
        digests[name].update(repr((example.prompt, example.completion, example.messages)).encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _refuse_others(every: Sequence[Mapping[str, Any]]) -> None:
    """Refuse where the ranks have not the same under every name."""
    others = [name for name, own in every[0].items() if any(found[name] != own for found in every)]
    if others:
        ranks = [rank for rank, found in enumerate(every) if found != every[0]]
        _refuse(f"{', '.join(others)}: rank {ranks[0]} has others than rank 0")


def _refuse(problem: str) -> NoReturn:
    raise UserError(
        f"the ranks have read different data ({problem})",
        where="data.domains",
        fix="give every node the same files, or put them on a shared file system",
    )
