"""What changes of a pool share: parts of a draft, rows of routers, and what a change reports.

No base model is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmixer.adapters.peft_format import read_adapter
from dsmixer.adapters.pool_draft import Draft
from dsmixer.adapters.router_rows import starts
from dsmixer.config.errors import UserError
from dsmixer.experts.init import named_generator

SHOWN = 3  # module paths named in an error
RETRAIN = "train the routers for a while (mixer.mixture in a recipe) before it serves"

Widths = dict[str, tuple[int, int]]
"""D and O of projections by their path."""


@dataclass(frozen=True)
class Changed:
    """A mixture folder that was written.

    Attributes:
        folder: where it is.
        experts: names of its pool, in order.
        notes: what else the user should know, a line each.
    """

    folder: Path
    experts: tuple[str, ...]
    notes: tuple[str, ...] = ()


def renamed(draft: Draft, names: Mapping[str, str]) -> Draft:
    """With new names, by the old ones, for some of its experts."""
    config = draft.config
    config = dataclasses.replace(
        config,
        experts=tuple(names.get(name, name) for name in config.experts),
        ranks={names.get(name, name): rank for name, rank in config.ranks.items()},
        alphas={names.get(name, name): alpha for name, alpha in config.alphas.items()},
    )
    experts = {names.get(name, name): path for name, path in draft.experts.items()}
    return dataclasses.replace(draft, config=config, experts=experts)


def check_free(draft: Draft, name: str, taken: Iterable[str]) -> None:
    """Raises ``UserError`` where a name is taken, also in other letters: it is a folder's name too."""
    if name.lower() in {other.lower() for other in taken}:
        fix = "give it another name, or remove or rename that one first (merge: --prefix)"
        raise UserError(f"an expert is called {name!r} already", where=str(draft.source), fix=fix)


def top_k_of(draft: Draft) -> int | None:
    """K as it is: what was left to the number of experts must not change with it, unless that was one."""
    config = draft.config
    if config.top_k is None and len(config.experts) == 1:
        return None
    return config.top_k if config.top_k is not None else config.default_routing().top_k


def widths_of(draft: Draft) -> Widths:
    """Of all projections that have mixers, as its experts and routers say; one expert at a time is read."""
    found: Widths = {}
    for folder in draft.experts.values():
        for path, pair in read_adapter(folder).pairs.items():
            found.setdefault(path, (pair.a_RD.shape[1], pair.b_OR.shape[0]))
    return found


def rows_generator(draft: Draft, path: str, names: Iterable[str]) -> torch.Generator:
    """Of the rows that these experts get in a router."""
    return named_generator(draft.config.seed, path, "router rows", *names)


def grown(draft: Draft, path: str, weight_ED: torch.Tensor, names: Sequence[str], start: str) -> torch.Tensor:
    """A router with a row more for each of these experts, ``[E + N, D]``."""
    if start not in starts:
        raise UserError(f"unknown start {start!r} of a row", fix=f"choose from {', '.join(starts)}")
    drawn = rows_generator(draft, path, names)
    return torch.cat((weight_ED, starts[start](weight_ED, len(names), draft.config.router_std, drawn)))


def fresh(draft: Draft, path: str, num_experts: int, width: int) -> torch.Tensor:
    """A router where none was."""
    drawn = rows_generator(draft, path, ())
    return torch.empty(num_experts, width).normal_(0.0, draft.config.router_std, generator=drawn)


def some(paths: Iterable[str]) -> str:
    """The first of many module paths, for a message."""
    listed = list(paths)
    shown = ", ".join(listed[:SHOWN])
    return shown if len(listed) <= SHOWN else f"{shown} and {len(listed) - SHOWN} more"
