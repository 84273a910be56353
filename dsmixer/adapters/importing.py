"""Adapters of others as a pool of experts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from dsmixer.adapters.module_names import base_module_names, shortest_names
from dsmixer.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, LoraAdapter, read_adapter
from dsmixer.config.errors import UserError
from dsmixer.config.stages import NAME_PATTERN
from dsmixer.experts.bank import ExpertBank, lora_scaling
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.targets import find_targets, is_projection, projection_widths

SHOWN = 3  # module paths named in an error


@dataclass(frozen=True)
class Pool:
    """Adapters that become experts, with what a ``MixerConfig`` has to know about them.

    Attributes:
        adapters: by expert name.
        rslora: how the mixture scales; true if every adapter is rsLoRA, unless the caller decided.
        ranks: R of each expert: its largest over projections.
        alphas: the alpha that gives each expert, at that rank and that way of scaling, its own ``s``.
    """

    adapters: Mapping[str, LoraAdapter]
    rslora: bool

    @property
    def ranks(self) -> dict[str, int]:
        return {name: adapter.rank for name, adapter in self.adapters.items()}

    @property
    def alphas(self) -> dict[str, float]:
        return {name: _alpha(adapter, self.rslora) for name, adapter in self.adapters.items()}

    def paths(self) -> list[str]:
        """Module paths that at least one adapter has weights for."""
        return list(dict.fromkeys(path for adapter in self.adapters.values() for path in adapter.pairs))

    def matrices(self, name: str, path: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """One expert on one projection at the expert's own rank, ``[R, D]`` and ``[O, R]``.

        A projection of a smaller rank is filled up with zeros, and one of another scale has it folded into
        ``lora_B``. None where the adapter has nothing: the expert adds nothing there.
        """
        adapter = self.adapters[name]
        pair = adapter.pairs.get(path)
        if pair is None:
            return None
        scaling = lora_scaling(adapter.rank, _alpha(adapter, self.rslora), self.rslora)
        b_OR = (
            pair.b_OR
            if math.isclose(pair.scaling, scaling, rel_tol=1e-12)
            else pair.b_OR * (pair.scaling / scaling)
        )
        missing = adapter.rank - pair.a_RD.shape[0]
        pad = nn.functional.pad
        return pad(pair.a_RD, (0, 0, 0, missing)), pad(b_OR, (0, missing))


def _alpha(adapter: LoraAdapter, rslora: bool) -> float:
    """The alpha at which the adapter's widest projection keeps its scale."""
    pair = max(adapter.pairs.values(), key=lambda pair: pair.a_RD.shape[0])
    alpha = float(adapter.config["lora_alpha"])
    if lora_scaling(adapter.rank, alpha, rslora) == pair.scaling:
        return alpha
    return pair.scaling * (math.sqrt(adapter.rank) if rslora else adapter.rank)


def read_pool(folders: Mapping[str, str | Path], *, rslora: bool | None = None) -> Pool:
    """Read adapter folders, before any model is loaded.

    Args:
        folders: PEFT LoRA folders by the name their expert gets.
        rslora: how the mixture scales; None: as the adapters do, if they all do the same.

    Raises:
        UserError: a name can't be a folder's name, or a folder is no plain LoRA adapter.
    """
    if not folders:
        raise UserError("no adapters to import", fix="name at least one adapter folder")
    for name in folders:
        check_expert_name(name)
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    for name, adapter in adapters.items():
        if any(pair.scaling == 0.0 for pair in adapter.pairs.values()):
            where = f"{adapter.folder / CONFIG_FILE}: lora_alpha"
            raise UserError(f"alpha 0 silences the expert {name}", where=where, fix="give its real alpha")
    if rslora is None:
        rslora = all(bool(adapter.config.get("use_rslora")) for adapter in adapters.values())
    return Pool(adapters, rslora)


def check_expert_name(name: str) -> None:
    """Refuse a name that could leave the mixture's folder.

    Raises:
        UserError: it has other signs than letters, digits, ``.``, ``_`` and ``-``, or starts with a sign.
    """
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        raise UserError(
            f"{name!r} can't be the name of an expert, which is a folder's name too",
            fix="use letters, digits, '.', '_' and '-', a letter or digit first, at most 100",
        )


def import_adapters(model: nn.Module, adapters: Mapping[str, str | Path], **options: Any) -> Mixture:
    """Put plain LoRA adapters on a model as a frozen pool of experts, with fresh routers.

    Args:
        model: a freshly loaded transformers model; changed in place.
        adapters: PEFT LoRA folders by the name their expert gets.
        options: other fields of ``MixerConfig``, such as ``top_k``. ``targets`` defaults to the projections
            that the adapters have.

    Raises:
        UserError: an adapter can't be read, or does not fit the model exactly.
    """
    owned = {"experts", "rank", "alpha", "ranks", "alphas"} & set(options)
    if owned:
        raise UserError(f"{', '.join(sorted(owned))} come from the adapters", fix="leave them out")
    pool = read_pool(adapters, rslora=options.pop("rslora", None))
    targets = options.pop("targets", None)
    if targets is None:
        check_paths(pool, model, pool.paths())
        targets = shortest_names(set(pool.paths()), base_module_names(model))
    # before anything is attached, so that a model that is refused stays as it was
    check_paths(pool, model, [target.path for target in find_targets(model, targets)])
    config = MixerConfig(
        targets=targets,
        experts=list(pool.adapters),
        ranks=pool.ranks,
        alphas=pool.alphas,
        rslora=pool.rslora,
        **options,
    )
    mixture = attach_mixers(model, config)
    fill_experts(mixture, pool)
    for _, parameter in mixture.expert_parameters():
        parameter.requires_grad_(False)
    return mixture


@torch.no_grad()
def fill_experts(mixture: Mixture, pool: Pool) -> None:
    """Write a pool's weights into a mixture whose config has the pool's ranks, alphas and scaling.

    Experts that the pool does not name stay as they are.

    Raises:
        UserError: an adapter does not fit the mixture's projections exactly.
    """
    check_scales(pool, mixture.config)
    check_paths(pool, mixture.model, mixture.mixers)
    local = [mixture.expert_names[e] for e in mixture.placement.layout.local]
    for path, mixer in mixture.mixers.items():
        fill_bank(pool, path, mixer.bank, local)


def fill_bank(pool: Pool, path: str, bank: ExpertBank, local: Sequence[str]) -> None:
    """Write a pool's weights of one projection into its bank.

    Args:
        pool: checked against the mixture.
        path: of the projection.
        bank: of the experts of this rank.
        local: their names, in the bank's order.
    """
    for index, name in enumerate(local):
        if name not in pool.adapters:
            continue
        matrices = pool.matrices(name, path)
        if matrices is None:
            with torch.no_grad():
                bank.lora_A[index].zero_()
                bank.lora_B[index].zero_()
        else:
            bank.set_expert(index, *matrices)


def check_scales(pool: Pool, config: MixerConfig) -> None:
    """Refuse a mixture that gives an adapter another rank, alpha or way of scaling than its own.

    Raises:
        UserError: names the adapter and both values.
    """
    if pool.rslora != config.rslora:
        problem = f"rslora is {pool.rslora} in the pool and {config.rslora} in the mixture"
        raise UserError(problem, where="mixer.rslora", fix="give both the same")
    ranks = dict(zip(config.experts, config.rank_list, strict=True))
    alphas = dict(zip(config.experts, config.alpha_list, strict=True))
    for name, adapter in pool.adapters.items():
        given, wanted = (pool.ranks[name], pool.alphas[name]), (ranks[name], alphas[name])
        if given[0] != wanted[0] or not math.isclose(given[1], wanted[1], rel_tol=1e-9):
            raise UserError(
                f"the expert {name} has rank {given[0]} and alpha {given[1]:g}, "
                f"but rank {wanted[0]} and alpha {wanted[1]:g} are asked for",
                where=str(adapter.folder / CONFIG_FILE),
                fix="leave rank and alpha to the adapter, or give its own",
            )


def check_paths(pool: Pool, model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse a pool whose weights and the model's projections do not match one to one.

    Args:
        model: the base, with or without mixers.
        paths: the projections that have or get mixers.

    Raises:
        UserError: weights for a module that is not there, is no projection, is not among ``paths`` or has
            other widths; or no weights for a projection that the adapter's own configuration targets.
    """
    targets = set(paths)
    names = base_module_names(model)
    linear = {}
    for name in names:
        module = model.get_submodule(name)
        base = module.base if isinstance(module, MixedLinear) else module
        if is_projection(base):
            linear[name] = projection_widths(base)
    for name, adapter in pool.adapters.items():
        _check_keys(name, adapter, set(names), linear, targets)
        _check_complete(name, adapter, linear)


def _check_keys(
    name: str,
    adapter: LoraAdapter,
    names: set[str],
    linear: Mapping[str, tuple[int, int]],
    targets: set[str],
) -> None:
    where = f"{adapter.folder / WEIGHTS_FILE} (expert {name})"
    for problem, unfit, fix in (
        (
            "this base has no module",
            [p for p in adapter.pairs if p not in names],
            "use the adapter's own base",
        ),
        (
            "no linear projection is",
            [p for p in adapter.pairs if p not in linear],
            "use plain LoRA on linear layers",
        ),
        (
            "the mixture has no mixer on",
            [p for p in adapter.pairs if p not in targets],
            "add their names to the mixer's targets, so that nothing of the adapter is lost",
        ),
    ):
        if unfit:
            raise UserError(
                f"{problem} {_some(unfit)}, for which the adapter has weights", where=where, fix=fix
            )
    for path, pair in adapter.pairs.items():
        widths = (pair.a_RD.shape[1], pair.b_OR.shape[0])
        if widths != linear[path]:
            raise UserError(
                f"{path}: the adapter maps {widths[0]} to {widths[1]}, the base {linear[path][0]} to "
                f"{linear[path][1]}",
                where=where,
                fix="use the base model that the adapter was trained on",
            )


def _check_complete(name: str, adapter: LoraAdapter, linear: Mapping[str, tuple[int, int]]) -> None:
    """PEFT would start the missing ones anew and say nothing; a file that lost a part must not pass."""
    config = adapter.config
    if config.get("target_modules") in (None, [], "all-linear"):
        return
    named = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    where = adapter.folder / CONFIG_FILE
    try:
        rule = LoraConfig(**{key: config[key] for key in named if config.get(key) not in (None, [], "")})
        missing = [p for p in linear if p not in adapter.pairs and check_target_module_exists(rule, p)]
        extra = [p for p in adapter.pairs if not check_target_module_exists(rule, p)]
    except (re.error, TypeError, ValueError) as error:
        raise UserError(f"the targets can't be read: {error}", where=str(where)) from error
    if missing:
        raise UserError(
            f"{WEIGHTS_FILE} has no weights for {_some(missing)}, which target_modules names (expert {name})",
            where=f"{where}: target_modules",
            fix="copy the whole adapter again",
        )
    if extra:
        raise UserError(
            f"{WEIGHTS_FILE} has weights for {_some(extra)}, which target_modules leaves out (expert {name})",
            where=f"{where}: target_modules",
            fix="bring the weights and the configuration of one adapter together",
        )


def _some(paths: list[str]) -> str:
    shown = ", ".join(paths[:SHOWN])
    return shown if len(paths) <= SHOWN else f"{shown} and {len(paths) - SHOWN} more"
