"""From the recipe to the plan of this run, and from the plan to this rank's experts."""

from __future__ import annotations

import os

import torch
from torch import nn

from dsmixer.config.ds_json import deepspeed_config
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe
from dsmixer.config.schema import Recipe
from dsmixer.experts.bank import ExpertBank
from dsmixer.model.inject import Settle
from dsmixer.model.load import bare_base
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.shape import model_shape
from dsmixer.placement.choice import usable_memory
from dsmixer.placement.exchange import Placement, local_placement, token_placement
from dsmixer.placement.groups import cut_weights, expert_parallel_group
from dsmixer.placement.layout import ExpertLayout
from dsmixer.placement.owners import Slots
from dsmixer.placement.plan import Plan, make_plan
from dsmixer.placement.request import Cluster
from dsmixer.training.planning import PoolFacts, first_stage, plan_request
from dsmixer.training.starting import Start
from dsmixer.training.world import World


def plan_run(
    loaded: LoadedRecipe,
    config: MixerConfig,
    slots: Slots | None,
    world: World,
    ds_path: str | None,
) -> Plan:
    """The plan of this run: arithmetic, the same on every rank.

    Args:
        loaded: the recipe.
        config: of the mixture.
        slots: in which stage one draws its experts' data; None without stage one.
        world: the ranks and their device.
        ds_path: a DeepSpeed JSON file from the command line.

    Raises:
        UserError: it does not fit the device, and the recipe does not say to try.
    """
    recipe = loaded.recipe
    shape = model_shape(bare_base(recipe.base), recipe.mixer.targets)
    facts = PoolFacts(config.experts, ranks=dict(zip(config.experts, config.rank_list, strict=True)))
    nodes = int(os.environ.get("CROSS_SIZE", "1"))
    cluster = Cluster(world.size, max(1, world.size // nodes), _device_memory(recipe, world.device))
    request = plan_request(loaded, shape, facts, cluster, ds_path=ds_path, slots=slots)
    plan = make_plan(request)
    if recipe.placement.check_memory:
        _check_memory(loaded, plan)
    return plan


def _device_memory(recipe: Recipe, device: torch.device) -> int | None:
    """Bytes; None where nothing says how many may be filled."""
    if recipe.placement.device_memory_gb is not None:
        return int(recipe.placement.device_memory_gb * 2**30)
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _check_memory(loaded: LoadedRecipe, plan: Plan) -> None:
    """Refuse what would end without memory after minutes of loading."""
    memory = plan.request.cluster.device_memory
    if plan.chosen.fits is not False or memory is None:
        return
    said = loaded.recipe.placement.device_memory_gb is not None
    raise UserError(
        f"by its plan a rank needs {plan.chosen.peak / 1e9:,.3g} GB, and may fill "
        f"{usable_memory(memory) / 1e9:,.3g} GB of its device",
        where=loaded.where("placement.device_memory_gb" if said else "placement.mode"),
        fix=f"change what makes it fit ({'; '.join(plan.remedies[:3])}), or write "
        "placement.check_memory: false to start all the same",
    )


def place_experts(plan: Plan, world: World) -> Placement:
    """This rank's experts as the plan says, with the exchange that brings tokens to them."""
    size, owners = plan.expert_parallel_size, plan.chosen.owners
    if size == 1:
        return local_placement(plan.request.pool.num_experts)
    layout = ExpertLayout(tuple(owners.held(rank) for rank in range(size)), world.rank % size)
    return token_placement(layout, expert_parallel_group(size), world.device)


def settle_weights(
    loaded: LoadedRecipe,
    config: MixerConfig,
    placement: Placement,
    start: Start,
    world: World,
    ds_path: str | None,
) -> Settle:
    """What becomes of each bank and router when it is made: filled from what is there, and cut under ZeRO-3.

    Args:
        loaded: the recipe, its ZeRO stage decided.
        config: of the mixture.
        placement: of this rank.
        start: ready-made weights, checked against the base.
        world: the ranks.
        ds_path: a DeepSpeed JSON file from the command line.
    """
    local = [config.experts[expert] for expert in placement.layout.local]
    cut = loaded.recipe.deepspeed.zero_stage == 3
    ds_config = deepspeed_config(loaded, first_stage(loaded), world.size, ds_path)
    start.check(config)

    def settle(path: str, module: nn.Module) -> None:
        bank = isinstance(module, ExpertBank)
        start.fill(path, module, local)
        if cut:
            cut_weights(module, ds_config, experts_over=placement.layout.size if bank else 1)

    return settle
