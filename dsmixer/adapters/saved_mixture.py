"""A mixture folder as values, and whether it fits a base: its own, or another one of the same shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsmixer.adapters.importing import Pool
from dsmixer.adapters.mixture_folder import CONFIG_FILE, EXPERTS_FOLDER, ROUTERS_FILE, read_description
from dsmixer.adapters.peft_format import read_adapter, read_safetensors
from dsmixer.adapters.peft_method import is_saved_by_peft, read_weights_of_peft
from dsmixer.config.errors import UserError
from dsmixer.model.inject import Mixture
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.targets import find_targets, is_projection, projection_widths
from dsmixer.routing.router import Router

LISTED = 6  # projections named in a refusal
ROUTER_KEY = ".weight"


@dataclass(frozen=True)
class SavedMixture:
    """What a mixture folder holds.

    Attributes:
        folder: that it was read from.
        about: what it says of its base.
        config: of its mixers.
        pool: its experts.
        routers: ``G [E, D]`` by the path of the projection that owns it.
    """

    folder: Path
    about: Mapping[str, Any]
    config: MixerConfig
    pool: Pool
    routers: Mapping[str, torch.Tensor]


def read_mixture(folder: str | Path) -> SavedMixture:
    """Read a mixture folder, before any model is loaded.

    Raises:
        UserError: it is no mixture, or an expert or a router in it can't be read.
    """
    folder = Path(folder)
    about, config = read_description(folder)
    if is_saved_by_peft(folder):
        adapters, routers = read_weights_of_peft(folder, config)
        return SavedMixture(folder, about, config, Pool(adapters, config.rslora), routers)
    adapters = {name: read_adapter(folder / EXPERTS_FOLDER / name) for name in config.experts}
    return SavedMixture(folder, about, config, Pool(adapters, config.rslora), read_routers(folder, config))


def read_routers(folder: Path, config: MixerConfig) -> dict[str, torch.Tensor]:
    """The routers of a mixture folder, by the path of the projection that owns each.

    Raises:
        UserError: they can't be read, or have not a row for each expert.
    """
    path = folder / ROUTERS_FILE
    found = {key.removesuffix(ROUTER_KEY): tensor for key, tensor in read_safetensors(path).items()}
    for owner, weight_ED in found.items():
        if weight_ED.dim() != 2 or len(weight_ED) != len(config.experts):
            problem = f"{owner}{ROUTER_KEY} is {list(weight_ED.shape)}, with {len(config.experts)} experts"
            raise UserError(problem, where=str(path), fix="copy the whole mixture again")
    return found


@torch.no_grad()
def fill_routers(mixture: Mixture, saved: SavedMixture) -> None:
    """Write a saved mixture's routers into those on a model.

    Raises:
        UserError: there are others there, or they are of other widths.
    """
    path = saved.folder / ROUTERS_FILE
    if set(mixture.routers) != set(saved.routers):
        odd = sorted(set(mixture.routers) ^ set(saved.routers))[:3]
        problem = f"its routers are not those of {CONFIG_FILE}: {', '.join(odd)}"
        raise UserError(problem, where=str(path), fix="copy the whole mixture again")
    for owner, router in mixture.routers.items():
        copy_router(saved, owner, router)


@torch.no_grad()
def copy_router(saved: SavedMixture, owner: str, router: Router) -> None:
    """Write the router that a projection owns into one on a model.

    Raises:
        UserError: it is not there, or of another width.
    """
    path, weight_ED = saved.folder / ROUTERS_FILE, saved.routers.get(owner)
    if weight_ED is None or weight_ED.shape != router.weight.shape:
        found = "not there" if weight_ED is None else str(list(weight_ED.shape))
        problem = f"{owner}{ROUTER_KEY} is {found}, expected {list(router.weight.shape)}"
        raise UserError(problem, where=str(path), fix="use the base model that the mixture was made on")
    router.weight.copy_(weight_ED)


def check_base(saved: SavedMixture, model: nn.Module, *, transfer: bool) -> None:
    """Refuse a base that a mixture was not made for, or does not fit.

    Args:
        saved: the mixture.
        model: the base, without mixers; its weights may be on the meta device.
        transfer: whether it may be of another kind, if only names and widths of its modules are the same.

    Raises:
        UserError: the base is of another kind, or projections do not match; the first of them are listed.
    """
    where = str(saved.folder / CONFIG_FILE)
    found = getattr(getattr(model, "config", None), "model_type", None)
    wanted = saved.about.get("model_type")
    if not transfer and wanted is not None and found != wanted:
        raise UserError(
            f"the base is a {found} model, and the mixture was made on a {wanted}",
            where=where,
            fix="give the mixture's own base, or, if modules have the same names and widths, ask for a "
            "transfer (transfer=True, --transfer, or mixer.transfer: true in a recipe)",
        )
    problems = list(misfits(saved, model))
    if problems:
        lines = problems[:LISTED]
        if len(problems) > LISTED:
            lines.append(f"and {len(problems) - LISTED} more")
        listed = "".join(f"\n    {line}" for line in lines)
        raise UserError(
            f"the mixture, of {len(widths_of(saved))} projections, does not fit this base; "
            f"{len(problems)} do not match:{listed}",
            where=where,
            fix="use the base model that the mixture was made on, or one with the same layers and widths",
        )


def widths_of(saved: SavedMixture) -> dict[str, tuple[int, int | None]]:
    """D and O of each projection of a mixture by its path; O is None where no expert has weights."""
    found: dict[str, tuple[int, int | None]] = {
        path: (weight_ED.shape[1], None) for path, weight_ED in saved.routers.items()
    }
    for adapter in saved.pool.adapters.values():
        for path, pair in adapter.pairs.items():
            found[path] = (pair.a_RD.shape[1], pair.b_OR.shape[0])
    return found


def misfits(saved: SavedMixture, model: nn.Module) -> Iterator[str]:
    """One line for each projection that a mixture and a base do not share, or not of the same widths.

    Args:
        saved: the mixture.
        model: the base, without mixers.
    """
    modules = dict(model.named_modules())
    wanted, place = widths_of(saved), {path: index for index, path in enumerate(modules)}
    for path in sorted(wanted, key=lambda path: place.get(path, len(place))):
        (width_in, width_out), module = wanted[path], modules.get(path)
        if module is None:
            yield f"{path}: the base has no such module"
        elif not is_projection(module):
            yield f"{path}: no linear projection in the base ({type(module).__name__})"
        else:
            found = projection_widths(module)
            if found != (width_in, width_out if width_out is not None else found[1]):
                told = width_out if width_out is not None else "?"
                yield f"{path}: {width_in} to {told} in the mixture, {found[0]} to {found[1]} in the base"
    try:
        targets = find_targets(model, saved.config.targets)
    except UserError as error:
        yield error.problem
        return
    # a projection that no expert has weights for stands in the files only by the router that it shares
    shared = saved.config.router == "per_block"
    routed = {target.block for target in targets if shared and target.path in saved.routers}
    for target in targets:
        if target.path not in wanted and target.block not in routed:
            yield f"{target.path}: in the base, and the mixture has nothing for it"
