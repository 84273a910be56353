"""From the recipe to the plan of this run, and from the plan to this rank's experts."""

from __future__ import annotations

import os

import torch

from dsmixer.config.recipe import LoadedRecipe
from dsmixer.data.records import Example
from dsmixer.model.load import bare_base
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.shape import model_shape
from dsmixer.placement.exchange import Placement, local_placement, token_placement
from dsmixer.placement.groups import expert_parallel_group
from dsmixer.placement.layout import ExpertLayout
from dsmixer.placement.plan import Plan, make_plan
from dsmixer.placement.request import Cluster
from dsmixer.training.data import RunData
from dsmixer.training.planning import PoolFacts, plan_request
from dsmixer.training.world import World


def plan_run(
    loaded: LoadedRecipe,
    config: MixerConfig,
    data: RunData,
    zero_stage: int,
    world: World,
    ds_path: str | None,
) -> Plan:
    """The plan of this run: arithmetic, the same on every rank.

    Args:
        loaded: the recipe.
        config: of the mixture.
        data: how much each expert trains on.
        zero_stage: resolved.
        world: the ranks and their device.
        ds_path: a DeepSpeed JSON file from the command line.
    """
    recipe = loaded.recipe
    shape = model_shape(bare_base(recipe.base), recipe.mixer.targets)
    ranks = dict(zip(config.experts, config.rank_list, strict=True))
    facts = PoolFacts(config.experts, _text_sizes(data), ranks)
    nodes = int(os.environ.get("CROSS_SIZE", "1"))
    on_gpu = world.device.type == "cuda"
    memory = torch.cuda.get_device_properties(world.device).total_memory if on_gpu else None
    cluster = Cluster(world.size, max(1, world.size // nodes), memory)
    return make_plan(plan_request(loaded, shape, facts, cluster, zero_stage=zero_stage, ds_path=ds_path))


def place_experts(plan: Plan, world: World) -> Placement:
    """This rank's experts as the plan says, with the exchange that brings tokens to them."""
    size, owners = plan.expert_parallel_size, plan.chosen.owners
    if size == 1:
        return local_placement(plan.request.pool.num_experts)
    layout = ExpertLayout(tuple(owners.held(rank) for rank in range(size)), world.rank % size)
    return token_placement(layout, expert_parallel_group(size), world.device)


def _text_sizes(data: RunData) -> dict[str, float]:
    """Characters that each expert trains on in an epoch: about in proportion to tokens, and known already."""
    sizes: dict[str, float] = {}
    for domain in data.domains:
        characters = sum(map(_num_characters, domain.train))
        sizes[domain.expert] = sizes.get(domain.expert, 0.0) + domain.weight * characters
    return sizes


def _num_characters(example: Example) -> int:
    said = sum(len(str(message["content"])) for message in example.messages or ())
    return said + len(example.prompt) + len(example.completion)
