"""A mixture with mixers only where they are worth keeping.

A pruned projection is the base's own again: no router, no experts, nothing to compute. The mixture folder
needs no form of its own for it: ``targets`` names the projections that keep their mixers, one by one, the
experts' folders hold weights for those alone, and so do the routers. Where projections share a router (one a
block), it stays as long as one of them does, and belongs to the first that is left.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsmixer.adapters.card import facts_of_mixers, license_of
from dsmixer.adapters.mixture_folder import (
    CARD_FILE,
    CONFIG_FILE,
    read_description,
    save_mixture,
    task_type,
    write_description,
)
from dsmixer.adapters.pool_draft import HISTORY, history_of
from dsmixer.adapters.publish import published
from dsmixer.config.errors import UserError
from dsmixer.model.inject import Mixture

SHOWN = 12  # names of kept units on the card


@dataclass(frozen=True)
class Pruned:
    """A mixture folder that was written.

    Attributes:
        folder: where it is.
        kept: module paths of the projections that keep their mixers.
        weights: weights of experts and routers that are left.
        notes: what else the user should know, a line each.
    """

    folder: Path
    kept: tuple[str, ...]
    weights: int
    notes: tuple[str, ...] = ()


def with_mixers_on(mixture: Mixture, kept: Iterable[str]) -> Mixture:
    """The part of a mixture that is left; the model itself is not changed.

    Args:
        mixture: all experts on this process.
        kept: module paths of its mixers.

    Raises:
        UserError: a path has no mixer, or all are kept, or none.
    """
    wanted = set(kept)
    strange = sorted(wanted - set(mixture.mixers))
    if strange:
        fix = f"choose from {', '.join(list(mixture.mixers)[:4])}, …"
        raise UserError(f"no mixer on {', '.join(strange[:3])}", fix=fix)
    mixers = {path: mixer for path, mixer in mixture.mixers.items() if path in wanted}
    if not mixers:
        raise UserError("nothing would be left of the mixture", fix="keep a projection, or use the base")
    if len(mixers) == len(mixture.mixers):
        raise UserError("all mixers are kept: nothing to prune", fix="keep fewer")
    owners: dict[int, str] = {}
    for path, mixer in mixers.items():
        owners.setdefault(mixer.router_index, path)
    by_index = list(mixture.routers.values())
    routers = {path: by_index[index] for index, path in owners.items()}
    config = replace(mixture.config, targets=tuple(mixers))
    return replace(mixture, config=config, mixers=mixers, routers=routers)


def num_weights(mixture: Mixture) -> int:
    """Weights of experts and routers, without the rows that only pad a smaller rank."""
    experts = sum(mixer.bank.num_weights() for mixer in mixture.mixers.values())
    return experts + sum(router.weight.numel() for router in mixture.routers.values())


def prune_mixture(
    mixture: Mixture,
    source: str | Path,
    kept: Sequence[str],
    out: str | Path,
    *,
    tokenizer: Any = None,
    units: Mapping[str, Sequence[str]] | None = None,
    why: str | None = None,
) -> Pruned:
    """Write a mixture folder with mixers on some projections of a mixture only.

    Weights are those of before, bit for bit; nothing is trained.

    Args:
        mixture: loaded from ``source``.
        source: its folder; what it says of its base stays.
        kept: module paths of the projections that keep their mixers.
        out: the new folder.
        tokenizer: saved along.
        units: names for the card, such as layers, with the paths of each; None: the paths themselves.
        why: by what figures they were chosen, for the card.

    Raises:
        UserError: nothing would be left or nothing is pruned, or something else is at ``out`` already.
    """
    source = Path(source)
    left = with_mixers_on(mixture, kept)
    about, _ = read_description(source)
    line = _told(mixture, left, source, units or {path: [path] for path in mixture.mixers}, why)
    history = [*history_of(source), line]
    facts = {
        **facts_of_mixers(mixture.config),
        "license": license_of(source / CARD_FILE),
        "history": [*history, "After this nothing was trained or evaluated but what is said here."],
        "limits": _silent(left),
    }
    with published(Path(out), may_replace=lambda _: False) as part:
        save_mixture(
            left,
            part,
            tokenizer=tokenizer,
            base=about.get("model"),
            revision=about.get("revision"),
            facts=facts,
        )
        description = json.loads((part / CONFIG_FILE).read_text(encoding="utf-8"))
        # how the base was held for this is not how the mixture wants it
        description |= {"base": dict(about), HISTORY: history}
        write_description(part, description, task_type(mixture.model))
    return Pruned(Path(out), tuple(left.mixers), num_weights(left), tuple(_silent(left)))


def _told(
    mixture: Mixture, left: Mixture, source: Path, units: Mapping[str, Sequence[str]], why: str | None
) -> str:
    names = [name for name, paths in units.items() if any(path in left.mixers for path in paths)]
    listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    text = (
        f"pruned: mixers on {len(left.mixers)} of the {len(mixture.mixers)} projections of "
        f"`{_name(source)}`, those of {listed}; {num_weights(left):,} of {num_weights(mixture):,} weights of "
        "experts and routers"
    )
    return f"{text}; {why}" if why else text


def _name(source: Path) -> str:
    """A mixture's name for its card: no path of a machine."""
    folder = source.resolve()
    return folder.parent.name if folder.name == "mixture" else folder.name


def _silent(left: Mixture) -> list[str]:
    """Experts that had weights on pruned projections only."""
    lines = []
    for index, name in enumerate(left.expert_names):
        if not any(bool(mixer.bank.lora_B[index].any()) for mixer in left.mixers.values()):
            lines.append(f"The expert `{name}` has no weights left: it answers as the base does.")
    return lines
