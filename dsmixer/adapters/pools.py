"""Pools that change: experts added to a published mixture, removed from it and renamed in it.

A changed mixture is another folder. Routers gain or lose rows; the rows and experts that stay are those of
before, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsmixer.adapters.importing import Pool, base_mismatches, check_expert_name, parts_left_out, read_pool
from dsmixer.adapters.mixture_folder import CONFIG_FILE
from dsmixer.adapters.peft_format import WEIGHTS_FILE
from dsmixer.adapters.pool_draft import Draft, open_draft, write_draft
from dsmixer.adapters.pool_parts import (
    RETRAIN,
    Changed,
    Widths,
    check_free,
    fresh,
    grown,
    renamed,
    some,
    top_k_of,
    widths_of,
)
from dsmixer.config.errors import UserError


def add_experts(
    mixture: str | Path,
    adapters: Mapping[str, str | Path],
    out: str | Path,
    *,
    extend: bool = False,
    in_place: bool = False,
    start: str = "mean",
) -> Changed:
    """Add adapters to a mixture as experts, after those that are there.

    Args:
        mixture: folder of a mixture.
        adapters: PEFT LoRA folders by the name their expert gets.
        out: folder of the new mixture.
        extend: whether projections that only an adapter has weights for get mixers too.
        in_place: whether ``out`` may be a mixture that is there already.
        start: what the new rows of the routers start as; see ``router_rows``.

    Raises:
        UserError: a name is taken or can't be one, an adapter can't be read, or does not fit the mixture.
    """
    draft = open_draft(mixture)
    pool = read_pool(adapters, rslora=draft.config.rslora)
    for name in pool.adapters:
        check_free(draft, name, draft.config.experts)
    widths = widths_of(draft)
    new = _fitting(draft, pool, widths, extend)
    experts = (*draft.config.experts, *pool.adapters)
    config = dataclasses.replace(
        draft.config,
        experts=experts,
        targets=(*draft.config.targets, *new),
        ranks={**draft.config.ranks, **pool.ranks},
        alphas={**draft.config.alphas, **pool.alphas},
        top_k=top_k_of(draft),
    )
    names = tuple(pool.adapters)
    routers = {path: grown(draft, path, weight, names, start) for path, weight in draft.routers.items()}
    for path, (width, _) in new.items():
        routers[path] = fresh(draft, path, len(experts), width)
    changed = dataclasses.replace(
        draft,
        config=config,
        experts={**draft.experts, **{name: adapter.folder for name, adapter in pool.adapters.items()}},
        routers=routers,
        history=(*draft.history, f"added {', '.join(names)}; their rows of the routers are not trained"),
        imported=_not_plain(pool),
    )
    notes = [
        f"{', '.join(names)}: the rows of the routers are new; {RETRAIN}",
        *base_mismatches(pool, draft.about.get("model")),
        *parts_left_out(pool, None),
    ]
    if new:
        notes.append(f"mixers added on {some(new)}, where the other experts contribute nothing")
    return Changed(write_draft(changed, out, in_place=in_place), experts, tuple(notes))


def remove_experts(
    mixture: str | Path, names: Sequence[str], out: str | Path, *, in_place: bool = False
) -> Changed:
    """Take experts out of a mixture, with their rows of the routers.

    Raises:
        UserError: a name is not in the pool, or nothing would be left.
    """
    draft = open_draft(mixture)
    for name in names:
        _check_there(draft, name)
    config = draft.config
    kept = tuple(name for name in config.experts if name not in names)
    if not kept:
        raise UserError("no expert would be left", where=str(draft.source), fix="leave at least one")
    top_k = top_k_of(draft)
    notes = []
    if top_k is not None and top_k > len(kept):
        notes.append(f"top_k is now {len(kept)}, as many as there are experts; it was {top_k}")
        top_k = len(kept)
    places = [index for index, name in enumerate(config.experts) if name in kept]
    changed = dataclasses.replace(
        draft,
        config=dataclasses.replace(
            config,
            experts=kept,
            ranks={name: rank for name, rank in config.ranks.items() if name in kept},
            alphas={name: alpha for name, alpha in config.alphas.items() if name in kept},
            top_k=top_k,
        ),
        experts={name: draft.experts[name] for name in kept},
        routers={path: weight_ED[places] for path, weight_ED in draft.routers.items()},
        history=(*draft.history, f"removed {', '.join(dict.fromkeys(names))}"),
    )
    return Changed(write_draft(changed, out, in_place=in_place), kept, tuple(notes))


def rename_experts(
    mixture: str | Path, names: Mapping[str, str], out: str | Path, *, in_place: bool = False
) -> Changed:
    """Give experts other names; two may swap theirs.

    Args:
        mixture: folder of a mixture.
        names: new names by the old ones.
        out: folder of the new mixture.
        in_place: whether ``out`` may be a mixture that is there already.

    Raises:
        UserError: a name is not in the pool, is taken, or can't be one.
    """
    draft = open_draft(mixture)
    staying = [name for name in draft.config.experts if name not in names]
    for old, new in names.items():
        _check_there(draft, old)
        check_expert_name(new)
        check_free(draft, new, staying)
        staying.append(new)
    changed = renamed(draft, names)
    told = ", ".join(f"{old} to {new}" for old, new in names.items())
    changed = dataclasses.replace(changed, history=(*draft.history, f"renamed {told}"))
    return Changed(write_draft(changed, out, in_place=in_place), tuple(changed.config.experts))


def _check_there(draft: Draft, name: str) -> None:
    if name not in draft.config.experts:
        fix = f"choose from {', '.join(draft.config.experts[:20])}"
        raise UserError(f"no expert is called {name!r}", where=str(draft.source), fix=fix)


def _fitting(draft: Draft, pool: Pool, widths: Widths, extend: bool) -> Widths:
    """Projections of the pool that the mixture has no mixer on.

    Raises:
        UserError: there are some and they are not asked for, or widths differ.
    """
    new: Widths = {}
    for name, adapter in pool.adapters.items():
        for path, pair in adapter.pairs.items():
            own = pair.a_RD.shape[1], pair.b_OR.shape[0]
            there = widths.get(path, new.get(path))
            if there is None and path in draft.routers:  # of a router whose experts have nothing there
                there = (draft.routers[path].shape[1], own[1])
            if there is None:
                new[path] = own
            elif there != own:
                raise UserError(
                    f"{path}: the adapter maps {own[0]} to {own[1]}, the mixture {there[0]} to {there[1]}",
                    where=f"{adapter.folder / WEIGHTS_FILE} (expert {name})",
                    fix="use an adapter of the mixture's base model",
                )
    if new and not extend:
        raise UserError(
            f"the mixture has no mixer on {some(new)}, for which the adapters have weights",
            where=str(draft.source / CONFIG_FILE),
            fix="ask for mixers there: extend=True, or --extend",
        )
    if new and draft.config.router == "per_block":
        raise UserError(
            f"one router a block leaves open which one {some(new)} would share",
            where=str(draft.source / CONFIG_FILE),
            fix="use an adapter without them, or a mixture with router: per_projection",
        )
    return new


def _not_plain(pool: Pool) -> Pool | None:
    """The adapters that PEFT would not read as they lie there: others' forms, or pickles."""

    others = {name: adapter for name, adapter in pool.adapters.items() if not adapter.verbatim}
    return Pool(others, pool.rslora) if others else None
