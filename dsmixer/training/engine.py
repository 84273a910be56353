"""A DeepSpeed engine around a mixture, for one stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsmixer.model.inject import Mixture
from dsmixer.placement import groups
from dsmixer.training.optimizer import AdamSettings, ExpertAdamW


@dataclass
class StageEngine:
    """The engine of one stage, with its optimizer bound to DeepSpeed's partitions.

    Attributes:
        engine: DeepSpeed's.
        optimizer: ours, inside it.
        shards: the partitions of this rank.
        mixture: what is trained.
        hooks_before: forward hooks on the model before the engine came.
    """

    engine: Any
    optimizer: ExpertAdamW
    shards: list[groups.Shard]
    mixture: Mixture
    hooks_before: int

    def gather(self, flat_of: Callable[[int], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU by parameter name; a collective."""
        layout = self.mixture.placement.layout
        return groups.gather_full(self.engine, self.shards, layout, flat_of)

    def scatter(self, whole: Mapping[str, torch.Tensor], flat_of: Callable[[int], torch.Tensor]) -> None:
        """This rank's part of whole tensors into its shards."""
        groups.scatter_full(self.shards, self.mixture.placement.layout, whole, flat_of)

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
    parameter_groups = groups.parameter_groups(
        [parameter for name, parameter in trainable if groups.is_bank(name)],
        [parameter for name, parameter in trainable if not groups.is_bank(name)],
        layout.size,
        stage,
    )
    optimizer = ExpertAdamW(parameter_groups, layout, settings)
    hooks_before = groups.count_hooks(mixture.model)
    engine, *_ = deepspeed.initialize(
        model=mixture.model, optimizer=optimizer, config=ds_config, model_parameters=parameters
    )
    shards = groups.shards(engine)
    optimizer.bind(shards)
    return StageEngine(engine, optimizer, shards, mixture, hooks_before)
