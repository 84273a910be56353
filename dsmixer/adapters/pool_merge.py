"""Two mixtures on one base as one."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from dsmixer.adapters.importing import check_expert_name
from dsmixer.adapters.pool_draft import Draft, open_draft, write_draft
from dsmixer.adapters.pool_parts import (
    RETRAIN,
    Changed,
    check_free,
    grown,
    renamed,
    rows_generator,
    top_k_of,
    widths_of,
)
from dsmixer.adapters.router_rows import starts
from dsmixer.adapters.sources import another_base
from dsmixer.config.errors import UserError
from dsmixer.model.mixer_config import MixerConfig


def merge_mixtures(
    first: str | Path, second: str | Path, out: str | Path, *, prefix: str = "", in_place: bool = False
) -> Changed:
    """Put the pools of two mixtures on one base together, the first one's experts first.

    Each router is that of the first over that of the second. Their logits have scales of their own, so how
    the two pools share tokens is not known before the routers are trained again.

    Args:
        first: folder of a mixture, which decides how the merged one routes.
        second: folder of another one.
        out: folder of the new mixture.
        prefix: put before the names of the second one's experts.
        in_place: whether ``out`` may be a mixture that is there already.

    Raises:
        UserError: two experts share a name, or the mixtures do not go together.
    """
    one, two = open_draft(first), open_draft(second)
    two = renamed(two, {name: f"{prefix}{name}" for name in two.config.experts})
    for name in two.config.experts:
        check_expert_name(name)
        check_free(one, name, one.config.experts)
    notes = _together(one, two)
    config = _merged_config(one, two)
    routers = {path: _stacked(one, two, path) for path in dict.fromkeys((*one.routers, *two.routers))}
    counts = len(one.config.experts), len(two.config.experts)
    changed = dataclasses.replace(
        one,
        config=config,
        experts={**one.experts, **two.experts},
        routers=routers,
        history=(
            *one.history,
            *(f"{line} (before the merge)" for line in two.history),
            f"merged: {counts[0]} experts of one mixture and {counts[1]} of another, whose routers were "
            "trained apart",
        ),
    )
    notes = [f"the routers were trained apart; {RETRAIN}", *notes]
    return Changed(write_draft(changed, out, in_place=in_place), tuple(config.experts), tuple(notes))


def _together(one: Draft, two: Draft) -> list[str]:
    """Whether two mixtures can be one; what may be otherwise than the user thinks.

    Raises:
        UserError: they are of different kinds of base or of routers, or a projection's widths differ.
    """
    where = f"{one.source} and {two.source}"
    for key, values in (
        ("base", (one.about.get("model_type"), two.about.get("model_type"))),
        ("router", (one.config.router, two.config.router)),
    ):
        if None not in values and values[0] != values[1]:
            problem = f"{key} is {values[0]} in the one and {values[1]} in the other"
            raise UserError(problem, where=where, fix="merge mixtures that were trained alike")
    widths, others = widths_of(one), widths_of(two)
    for path in widths.keys() & others.keys():
        if widths[path] != others[path]:
            problem = f"{path} maps {widths[path]} in the one and {others[path]} in the other"
            raise UserError(problem, where=where, fix="merge mixtures on one base")
    per_block = one.config.router == "per_block"
    if per_block and set(one.config.targets) != set(two.config.targets):
        problem = "with one router a block, both have to be on the same projections"
        raise UserError(problem, where=where, fix="use mixtures with router: per_projection")
    notes = []
    bases = one.about.get("model"), two.about.get("model")
    if another_base(*bases):
        notes.append(f"the bases are called {bases[0]} and {bases[1]}; the merged mixture is on the first")
    routing = one.config.default_routing()
    if routing != two.config.default_routing():
        notes.append(f"it routes as the first does: {routing.mode}, K={routing.top_k}")
    return notes


def _merged_config(one: Draft, two: Draft) -> MixerConfig:
    """The pool of both, scaled as the first one scales."""
    ours, theirs = one.config, two.config
    alphas = dict(zip(theirs.experts, theirs.alpha_list, strict=True))
    ranks = dict(zip(theirs.experts, theirs.rank_list, strict=True))
    if ours.rslora != theirs.rslora:
        # alpha / sqrt(R) and alpha / R are to be the same factor as before
        alphas = {
            name: alpha / math.sqrt(ranks[name]) if ours.rslora else alpha * math.sqrt(ranks[name])
            for name, alpha in alphas.items()
        }
    own_ranks = dict(zip(ours.experts, ours.rank_list, strict=True))
    own_alphas = dict(zip(ours.experts, ours.alpha_list, strict=True))
    return dataclasses.replace(
        ours,
        experts=(*ours.experts, *theirs.experts),
        targets=tuple(dict.fromkeys((*ours.targets, *theirs.targets))),
        ranks={**own_ranks, **ranks},
        alphas={**own_alphas, **alphas},
        top_k=top_k_of(one),
    )


def _stacked(one: Draft, two: Draft, path: str) -> torch.Tensor:
    """Both routers of a projection; where one mixture has none, its experts get rows that are new."""
    first, second = one.routers.get(path), two.routers.get(path)
    if first is not None and second is not None:
        return torch.cat((first, second))
    if second is None:
        assert first is not None
        return grown(one, path, first, two.config.experts, "mean")
    rows = starts["mean"](second, len(one.config.experts), 0.0, rows_generator(one, path, one.config.experts))
    return torch.cat((rows, second))
