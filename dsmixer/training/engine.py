"""A DeepSpeed engine around a mixture, for one stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dsmixer.model.inject import Mixture
from dsmixer.placement import groups
from dsmixer.placement.pieces import Run, Shard, all_runs, is_bank, runs_to_save
from dsmixer.placement.sharing import SharedExperts
from dsmixer.training.optimizer import AdamSettings, ExpertAdamW


@dataclass
class StageEngine:
    """The engine of one stage, with its optimizer bound to DeepSpeed's partitions.

    Attributes:
        engine: DeepSpeed's.
        optimizer: ours, inside it.
        shards: the partitions of this rank.
        shared: the experts that this rank holds with others of its group.
        mixture: what is trained.
        hooks_before: forward hooks on the model before the engine came.
    """

    engine: Any
    optimizer: ExpertAdamW
    shards: list[Shard]
    shared: SharedExperts
    mixture: Mixture
    hooks_before: int

    def gradients(self) -> list[list[torch.Tensor]]:
        """The gradients of a finished accumulation, as ``groups.gradients``; a collective."""
        grads = groups.gradients(self.engine, self.shards)
        self.shared.add_up(grads)
        return grads

    def runs(self) -> Iterator[tuple[int, str, Run]]:
        """Index of the shard, name of the parameter, and run, of all that this rank holds."""
        return all_runs(self.shards, self.mixture.placement.layout)

    def runs_to_save(self) -> Iterator[tuple[int, str, Run]]:
        """Those that this rank saves; under ZeRO-0, where every rank has everything, its share of them."""
        share = (dist.get_rank(), dist.get_world_size()) if groups.zero_stage(self.engine) == 0 else None
        return runs_to_save(self.shards, self.mixture.placement.layout, share)

    def release(self) -> None:
        """Give the model back, without a trace of the engine."""
        groups.release(self.engine, self.hooks_before)


def start_engine(
    mixture: Mixture,
    trainable: list[tuple[str, nn.Parameter]],
    settings: AdamSettings,
    ds_config: dict[str, Any],
) -> StageEngine:
    """Initialise DeepSpeed on a mixture of which only ``trainable`` trains.

    Args:
        mixture: the model and its mixers.
        trainable: names and parameters, not empty.
        settings: of the optimizer.
        ds_config: the engine's configuration, from ``config.ds_json.deepspeed_config``.
    """
    import deepspeed

    for parameter in mixture.model.parameters():
        parameter.requires_grad_(False)
    for _, parameter in trainable:
        parameter.requires_grad_(True)
    parameters = [parameter for _, parameter in trainable]
    layout, stage = mixture.placement.layout, int(ds_config["zero_optimization"]["stage"])
    if layout.size > 1:
        banks = [parameter for _, parameter in mixture.expert_parameters()]
        groups.spread_experts(mixture.model, banks, layout.size, stage)
        ds_config = groups.config_for_spread(ds_config)
    parameter_groups = groups.parameter_groups(
        [parameter for name, parameter in trainable if is_bank(name)],
        [parameter for name, parameter in trainable if not is_bank(name)],
        layout.size,
        stage,
    )
    optimizer = ExpertAdamW(parameter_groups, layout, settings)
    hooks_before = groups.count_hooks(mixture.model)
    engine, *_ = deepspeed.initialize(
        model=mixture.model, optimizer=optimizer, config=ds_config, model_parameters=parameters
    )
    groups.keep_gradients(engine)
    shards = groups.shards(engine)
    optimizer.bind(shards)
    shared = SharedExperts(engine, shards, layout)
    return StageEngine(engine, optimizer, shards, shared, mixture, hooks_before)
