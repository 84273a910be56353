"""From a recipe and a model's shape to a placement plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsmixer.config.batch import accumulation_steps
from dsmixer.config.checks import check_outputs_here, needs_outputs
from dsmixer.config.ds_json import deepspeed_config
from dsmixer.config.recipe import STAGES, LoadedRecipe
from dsmixer.config.stages import Stage2Config, StageConfig
from dsmixer.placement.owners import Slots
from dsmixer.placement.request import Cluster, EngineSizes, ModelShape, PlanRequest, Pool, StageShape

BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class PoolFacts:
    """What is known of the experts beside the recipe.

    Attributes:
        names: in order.
        tokens: training tokens, or anything in proportion to them, by name; 1 where there is nothing.
        ranks: LoRA rank by name, where it is not ``mixer.rank``.
    """

    names: Sequence[str]
    tokens: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)


def plan_request(
    loaded: LoadedRecipe,
    model: ModelShape,
    facts: PoolFacts,
    cluster: Cluster,
    *,
    ds_path: str | None = None,
    slots: Slots | None = None,
) -> PlanRequest:
    """The plan's request for a recipe.

    Args:
        loaded: the recipe, DeepSpeed file merged in.
        model: of the base.
        facts: the pool.
        cluster: the ranks.
        ds_path: a DeepSpeed JSON file from the command line.
        slots: in which stage one draws the experts' data; None: such as ``facts.tokens`` will lead to.

    Raises:
        UserError: the rows of a step cannot be dealt out to the ranks, or a loss does not go with the mode.
    """
    recipe = loaded.recipe
    written = recipe.deepspeed.zero_stage
    size = recipe.placement.expert_parallel_size
    zero_block = deepspeed_config(loaded, first_stage(loaded), cluster.world_size, ds_path)[
        "zero_optimization"
    ]
    return PlanRequest(
        model=model,
        pool=_pool(loaded, facts),
        cluster=cluster,
        stages=tuple(_stages(loaded, len(facts.names), cluster.world_size)),
        base_bytes=BYTES[recipe.base.dtype],
        four_bit=recipe.base.quantization != "none",
        double_quantization=recipe.base.double_quantization,
        checkpointing=recipe.base.activation_checkpointing,
        dropout=recipe.mixer.dropout > 0,
        engine=EngineSizes.from_config(zero_block),
        mode=_mode(loaded),
        zero_stage=written if isinstance(written, int) else None,
        expert_parallel_size=size if isinstance(size, int) else None,
        slots=slots,
        offload=_offload(zero_block),
    )


def _mode(loaded: LoadedRecipe) -> str:
    """The mode asked for, or the only one there is for a loss on what single experts put out."""
    check_outputs_here(loaded)
    asked, stage = loaded.recipe.placement.mode, loaded.recipe.stage2
    return "replicate" if asked == "auto" and stage.enabled and needs_outputs(stage) else asked


def _offload(zero_block: Mapping[str, Any]) -> frozenset[str]:
    """What a DeepSpeed configuration keeps on the host."""
    keys = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
    blocks = {name: zero_block.get(key) or {} for name, key in keys.items()}
    return frozenset(name for name, block in blocks.items() if block.get("device", "none") != "none")


def first_stage(loaded: LoadedRecipe) -> StageConfig:
    """The first enabled stage."""
    return next(loaded.stage(name) for name in STAGES if loaded.stage(name).enabled)


def _pool(loaded: LoadedRecipe, facts: PoolFacts) -> Pool:
    mixer = loaded.recipe.mixer
    written = {spec.name: spec.rank for spec in mixer.experts or () if spec.rank is not None}
    ranks = {**written, **facts.ranks}
    return Pool(
        ranks=tuple(ranks.get(name, mixer.rank) for name in facts.names),
        tokens=tuple(facts.tokens.get(name, 1.0) for name in facts.names),
        names=tuple(facts.names),
        router=mixer.router,
    )


def _stages(loaded: LoadedRecipe, num_experts: int, world_size: int) -> list[StageShape]:
    shapes = []
    for name in STAGES:
        stage = loaded.stage(name)
        if not stage.enabled:
            continue
        second = stage if isinstance(stage, Stage2Config) else None
        preserve = second is not None and second.experts == "preserve"
        shapes.append(
            StageShape(
                name=name,
                rows=stage.micro_batch_size,
                max_length=loaded.recipe.data.max_length,
                accumulation=accumulation_steps(loaded, name, world_size),
                trains_experts=second is None or preserve,
                trains_routers=second is not None,
                keeps_origin=preserve,
                top_k=None if second is None else min(second.top_k, num_experts),
                every_expert=second is not None and second.routing != "topk",
                eight_bit=stage.optimizer.endswith("8bit"),
                paged=stage.optimizer.startswith("paged"),
                origin_on_host=second is not None and second.preserve.origin == "host",
                outputs_apart=second is not None and needs_outputs(second),
            )
        )
    return shapes
