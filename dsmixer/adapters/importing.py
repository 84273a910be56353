"""Adapters of others as a pool of experts."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dsmixer.adapters.beside import parts_beside
from dsmixer.adapters.fitting import check_fit
from dsmixer.adapters.module_names import base_module_names, shortest_names
from dsmixer.adapters.old_names import with_names_of
from dsmixer.adapters.peft_format import CONFIG_FILE, LoraAdapter, read_adapter
from dsmixer.adapters.sources import adapter_folder, another_base
from dsmixer.adapters.untrusted import printable, shown
from dsmixer.config.errors import UserError
from dsmixer.config.stages import NAME_PATTERN
from dsmixer.experts.bank import ExpertBank, lora_scaling
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.targets import find_targets

OWN_OPTIONS = {"experts", "rank", "alpha", "ranks", "alphas"}
"""Fields of ``MixerConfig`` that the adapters decide."""


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
        if pair is None or pair.rank == 0:
            return None
        scaling = lora_scaling(adapter.rank, _alpha(adapter, self.rslora), self.rslora)
        b_OR = (
            pair.b_OR
            if math.isclose(pair.scaling, scaling, rel_tol=1e-12)
            else pair.b_OR * (pair.scaling / scaling)
        )
        missing = adapter.rank - pair.rank
        pad = nn.functional.pad
        return pad(pair.a_RD, (0, 0, 0, missing)), pad(b_OR, (0, missing))


def _alpha(adapter: LoraAdapter, rslora: bool) -> float:
    """The alpha at which the adapter's widest projection keeps its scale, whose sign goes to ``lora_B``."""
    pair = max(adapter.pairs.values(), key=lambda pair: pair.rank)
    alpha = float(adapter.config["lora_alpha"])
    if lora_scaling(adapter.rank, alpha, rslora) == pair.scaling:
        return abs(alpha)
    return abs(pair.scaling) * (math.sqrt(adapter.rank) if rslora else adapter.rank)


def read_pool(
    sources: Mapping[str, str | Path], *, rslora: bool | None = None, revision: str | None = None
) -> Pool:
    """Read adapters, before any model is loaded.

    Args:
        sources: folders of PEFT adapters or hub ids, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``, by the name
            their expert gets. A folder beats a hub id of the same name.
        rslora: how the mixture scales; None: as the adapters do, if they all do the same.
        revision: on the hub, of those that do not name one.

    Raises:
        UserError: a name can't be a folder's name, or an adapter can't be had or is no sum of low rank.
    """
    if not sources:
        raise UserError("no adapters to import", fix="name at least one adapter folder")
    if not isinstance(sources, Mapping):
        raise UserError("the adapters have no names", fix="give a mapping, {NAME: FOLDER_OR_HUB_ID}")
    for name in sources:
        check_expert_name(name)
    folded: dict[str, str] = {}
    for name in sources:
        other = folded.setdefault(name.lower(), name)
        if other != name:
            problem = f"the experts {other} and {name} would share a folder where case does not count"
            raise UserError(problem, fix="rename one of them")
    adapters = {name: read_adapter(adapter_folder(source, revision)) for name, source in sources.items()}
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
            f"{printable(repr(name))} can't be the name of an expert, which is a folder's name too",
            fix="use letters, digits, '.', '_' and '-', a letter or digit first, at most 100",
        )


class BaseMismatchWarning(UserWarning):
    """An adapter says that it was trained on another base than it is put on."""


class LeftOutWarning(UserWarning):
    """Something was trained with an adapter that is no part of its expert."""


def base_mismatches(
    pool: Pool, base: str | None, revision: str | None = None, config: Any = None
) -> list[str]:
    """One line for each adapter that names another base model, or another revision of it.

    Shapes decide whether an adapter fits; names are told, see :func:`dsmixer.adapters.sources.another_base`.

    Args:
        pool: the adapters.
        base: id or path of the base they are put on.
        revision: of that base; None: not known, and not compared.
        config: the base's configuration, which may have its name too.
    """
    lines = []
    for name, adapter in pool.adapters.items():
        named, own = (adapter.config.get(key) for key in ("base_model_name_or_path", "revision"))
        says = f"the adapter {name} says that it was trained on"
        if another_base(named, base, getattr(config, "_name_or_path", None)):
            given = base or getattr(config, "_name_or_path", None)
            lines.append(
                f"{says} {printable(named)}, not on {printable(given)}: its shapes fit, but its outputs may "
                "make no sense"
            )
        elif isinstance(own, str) and own and revision not in (None, own):
            lines.append(f"{says} revision {printable(own)} of its base, not on {printable(revision)}")
    return lines


def parts_left_out(pool: Pool, config: Any) -> list[str]:
    """One line for each adapter with trained parts beside its weights, which no expert has.

    Args:
        pool: the adapters.
        config: the base's configuration, which says how many tokens it embeds.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    found = {name: parts_beside(own.folder, vocabulary) for name, own in pool.adapters.items()}
    return [
        f"the adapter {name} has {' and '.join(parts)}, which its expert leaves out: it may not answer as it "
        "was trained to"
        for name, parts in found.items()
        if parts
    ]


def import_adapters(
    model: nn.Module, adapters: Mapping[str, str | Path], *, revision: str | None = None, **options: Any
) -> Mixture:
    """Put ready-made adapters on a model as a frozen pool of experts, with fresh routers.

    An adapter that says that it was trained on another base is told with a ``BaseMismatchWarning``, and one
    with trained parts beside its weights with a ``LeftOutWarning``.

    Args:
        model: a freshly loaded transformers model; changed in place.
        adapters: folders of PEFT adapters, or hub ids (``OWNER/NAME``, ``OWNER/NAME@REVISION``), by the
            name their expert gets.
        revision: on the hub, of those that do not name one.
        options: other fields of ``MixerConfig``, such as ``top_k``. ``targets`` defaults to the projections
            that the adapters have.

    Raises:
        UserError: an adapter can't be read, or does not fit the model exactly; the model has mixers or
            adapters of PEFT already; or an option is none.
    """
    check_bare(model)
    _check_options(options)
    pool = read_pool(adapters, rslora=options.pop("rslora", None), revision=revision)
    pool = on_base(pool, model)
    # before anything is attached, so that a model that is refused stays as it was
    config = pool_config(pool, model, options.pop("targets", None), **options)
    mixture = attach_mixers(model, config)
    fill_experts(mixture, pool)
    for _, parameter in mixture.expert_parameters():
        parameter.requires_grad_(False)
    base = getattr(model, "config", None)
    for line in base_mismatches(pool, None, config=base):
        warnings.warn(line, BaseMismatchWarning, stacklevel=2)
    for line in parts_left_out(pool, base):
        warnings.warn(line, LeftOutWarning, stacklevel=2)
    return mixture


def check_bare(model: nn.Module) -> None:
    """Refuse a model whose projections are not its own any more.

    Raises:
        UserError: it has mixers, or adapters of PEFT.
    """
    for name, module in model.named_modules():
        if isinstance(module, MixedLinear):
            fix = "import all adapters at once, or add more to the mixture's folder: dsmixer pool add"
            raise UserError("this model has mixers already", where=name, fix=fix)
        if isinstance(module, BaseTunerLayer):
            fix = "give the base as it was loaded, before get_peft_model, PeftModel or load_adapter"
            raise UserError("this model has adapters of PEFT already", where=name, fix=fix)


def _check_options(options: Mapping[str, Any]) -> None:
    owned = OWN_OPTIONS & set(options)
    if owned:
        raise UserError(f"{', '.join(sorted(owned))} come from the adapters", fix="leave them out")
    known = {field.name for field in fields(MixerConfig)}
    unknown = [printable(key, 60) for key in options if key not in known]
    if unknown:
        problem = f"{', '.join(unknown)}: there is no such option"
        raise UserError(problem, fix=f"choose from {', '.join(sorted(known - OWN_OPTIONS))}")
    if isinstance(options.get("targets"), str):
        problem = f"targets is the text {printable(options['targets'], 60)!r}, and not a list of names"
        raise UserError(problem, fix=f"write [{printable(options['targets'], 60)!r}]")


def on_base(pool: Pool, model: nn.Module) -> Pool:
    """The pool with the names that the model's modules have now, where earlier releases had others."""
    return replace(pool, adapters=with_names_of(model, pool.adapters))


def pool_config(pool: Pool, model: nn.Module, targets: Sequence[str] | None, **options: Any) -> MixerConfig:
    """The configuration of a mixture of a pool on a model, both held against each other.

    Args:
        pool: the adapters.
        model: the base; its weights may be on the meta device.
        targets: what gets mixers; None: the projections that the adapters have.
        options: other fields of ``MixerConfig``.

    Raises:
        UserError: an adapter does not fit the model, or has weights outside ``targets``.
    """
    if targets is None:
        check_paths(pool, model, pool.paths())
        targets = shortest_names(set(pool.paths()), base_module_names(model))
    check_paths(pool, model, [target.path for target in find_targets(model, targets)])
    return MixerConfig(
        targets=targets,
        experts=list(pool.adapters),
        ranks=pool.ranks,
        alphas=pool.alphas,
        rslora=pool.rslora,
        **options,
    )


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
                where=shown(adapter.folder / CONFIG_FILE),
                fix="leave rank and alpha to the adapter, or give its own",
            )


def check_paths(pool: Pool, model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse a pool whose weights and the model's projections do not match one to one.

    Args:
        pool: the adapters.
        model: the base, with or without mixers.
        paths: the projections that have or get mixers.

    Raises:
        UserError: see :func:`dsmixer.adapters.fitting.check_fit`.
    """
    check_fit(pool.adapters, model, set(paths))
