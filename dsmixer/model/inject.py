"""Put mixers on a model's projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dsmixer.config.errors import UserError
from dsmixer.experts.bank import ExpertBank, padded_rank
from dsmixer.experts.init import named_generator, normal_rows
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.state_space import call_projections
from dsmixer.model.streams import stream_of
from dsmixer.model.targets import Target, find_targets
from dsmixer.placement.exchange import Placement, local_placement
from dsmixer.routing.context import RoutingContext, Stream
from dsmixer.routing.modes import Routing, modes
from dsmixer.routing.requests import BY_ROUTERS, Request, routing_by_row, routing_of
from dsmixer.routing.router import Router


@dataclass(frozen=True)
class Mixture:
    """A model with mixers on it.

    Attributes:
        model: the transformers model, changed in place.
        config: what was attached.
        mixers: the mixed projections by module path, in the order of the model's modules.
        routers: the routers by the path of the projection that owns each, in the order of their index in
            the statistics.
        context: shared by all mixers.
        placement: which experts are on this rank.
    """

    model: nn.Module
    config: MixerConfig
    mixers: dict[str, MixedLinear]
    routers: dict[str, Router]
    context: RoutingContext
    placement: Placement

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(self.config.experts)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Whose tokens each router sees, in the order of ``routers``."""
        return tuple(self.mixers[path].stream for path in self.routers)

    def expert_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``lora_A`` and ``lora_B`` of every bank, with their names in the model."""
        for path, mixer in self.mixers.items():
            yield f"{path}.bank.lora_A", mixer.bank.lora_A
            yield f"{path}.bank.lora_B", mixer.bank.lora_B

    def router_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``G`` of every router, with its name in the model."""
        for path, router in self.routers.items():
            yield f"{path}.router.weight", router.weight


Settle = Callable[[str, nn.Module], None]
"""Takes the path of a projection and a bank or router just made for it, before the next one is made."""


def attach_mixers(
    model: nn.Module,
    config: MixerConfig,
    placement: Placement | None = None,
    settle: Settle | None = None,
) -> Mixture:
    """Freeze ``model`` and put a pool of experts and a router on each projection that ``config`` names.

    The model is changed in place. Its experts start as PEFT's LoRA does, so that the outputs are those of
    the base until something trains. Outside ``route_to`` it routes by its routers.

    Args:
        model: a transformers model.
        config: the pool and its projections.
        placement: the experts of this rank; None: all of them. An expert starts the same wherever it is.
        settle: what is done with each bank and router as soon as it is there, so that never the weights of
            all have to be whole at once: filled from adapters, cut by ZeRO-3.

    Raises:
        UserError: a target is not there, or the model has mixers already.
    """
    if getattr(model, "dsmixer", None) is not None:
        raise UserError("this model already has mixers", fix="attach them to a freshly loaded model")
    targets = find_targets(model, config.targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    context = RoutingContext(len(config.experts), config.default_routing())
    placement = local_placement(len(config.experts)) if placement is None else placement
    mixers: dict[str, MixedLinear] = {}
    routers: dict[str, Router] = {}
    leaders: dict[str, tuple[int, Router]] = {}
    for target in targets:
        slot = target.block if config.router == "per_block" else target.path
        owns_router = slot not in leaders
        if owns_router:
            leaders[slot] = (len(leaders), _new_router(model, target, config))
            routers[target.path] = leaders[slot][1]
        index, router = leaders[slot]
        mixer = _mix(model, target, config, context, placement, router, index, owns_router)
        mixers[target.path] = mixer
        if settle is not None:
            settle(target.path, mixer.bank)
            if owns_router:
                settle(target.path, router)
    for path, mixer in mixers.items():
        parent_path, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, mixer)
    call_projections(model)
    mixture = Mixture(model, config, mixers, routers, context, placement)
    model.dsmixer = _Attached(mixture)  # type: ignore[assignment]
    return mixture


class _Attached:
    """Holds the mixture on its model, out of sight of ``nn.Module``'s own bookkeeping."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture


def mixture_of(model: nn.Module) -> Mixture:
    """The mixture attached to ``model`` (or to the model that a DeepSpeed engine wraps)."""
    attached = getattr(model, "dsmixer", None)
    if attached is None and isinstance(getattr(model, "module", None), nn.Module):
        attached = getattr(model.module, "dsmixer", None)
    if attached is None:
        raise UserError("this model has no mixers", fix="call attach_mixers(model, MixerConfig(...)) first")
    mixture: Mixture = attached.mixture
    return mixture


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _new_router(model: nn.Module, target: Target, config: MixerConfig) -> Router:
    device = _device_of(model.get_submodule(target.path))
    router = Router(len(config.experts), target.in_features, device)
    if not router.weight.is_meta:
        generator = named_generator(config.seed, target.block, "router")
        start = normal_rows(len(config.experts), target.in_features, config.router_std, generator)
        with torch.no_grad():
            router.weight.copy_(start)
    return router


def _mix(
    model: nn.Module,
    target: Target,
    config: MixerConfig,
    context: RoutingContext,
    placement: Placement,
    router: Router,
    index: int,
    owns_router: bool,
) -> MixedLinear:
    base = model.get_submodule(target.path)
    here = placement.layout.local
    bank = ExpertBank(
        [config.experts[e] for e in here],
        target.in_features,
        target.out_features,
        ranks=[config.rank_list[e] for e in here],
        alphas=[config.alpha_list[e] for e in here],
        rslora=config.rslora,
        compute=config.compute,
        rank=padded_rank(config.rank_list),
        device=_device_of(base),
    )
    bank.start(config.seed, target.path)
    mixer = MixedLinear(
        base,
        bank,
        router,
        router_index=index,
        context=context,
        exchange=placement.exchange,
        dropout=config.dropout,
        shared=config.router == "per_block" and target.shares_input,
        owns_router=owns_router,
        stream=stream_of(model, target.path),
    )
    # a new module starts in training mode, and a model that evaluates must not begin to drop inputs
    return mixer.train(base.training)


@contextmanager
def route_to(model: nn.Module, expert: Request | Sequence[Request]) -> Iterator[None]:
    """Send every token to one expert with weight 1, or to none, or each row of a batch its own way.

    Args:
        model: a model with mixers attached.
        expert: an expert's name; None for the base model; ``BY_ROUTERS`` for the experts that the routers
            choose. Or a list of these, one for each row of the batch; where ``generate`` makes several rows
            of one (beams, returned sequences), one for each row that it was given.

    Raises:
        UserError: no expert has that name; in the forward pass, the batch does not have as many rows.
    """
    mixture = mixture_of(model)
    by_routers = mixture.context.routing
    if by_routers.mode not in modes or by_routers.rows is not None:
        by_routers = mixture.config.default_routing()
    names = mixture.expert_names
    if expert is None or expert is BY_ROUTERS or isinstance(expert, str):
        routing = routing_of(expert, names, by_routers)
    else:
        routing = routing_by_row(expert, names, by_routers)
    with mixture.context.routed(routing):
        yield


@contextmanager
def route_by(model: nn.Module, routing: Routing) -> Iterator[None]:
    """Route in another way for a while, such as ``Routing(mode="uniform")``."""
    with mixture_of(model).context.routed(routing):
        yield
