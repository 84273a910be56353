"""Between a stage's engine and its checkpoints."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from dsmixer.checkpoint.schema import Checkpoint, CheckpointState
from dsmixer.model.inject import Mixture
from dsmixer.placement import groups
from dsmixer.training.engine import StageEngine

MOMENTS = ("exp_avg", "exp_avg_sq")
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "safetensors")


def snapshot(
    engine: StageEngine,
    *,
    stage: int,
    step: int,
    num_steps: int,
    cursor: Mapping[str, Any],
    usage: torch.Tensor | None,
) -> Checkpoint:
    """Everything a stage has to go on from, whole, on every rank; a collective."""
    optimizer, shards = engine.optimizer, engine.shards
    tensors = _prefixed("weights", engine.gather(lambda i: shards[i].flat()))
    for key in MOMENTS:
        tensors |= _prefixed(key, engine.gather(partial(optimizer.moment, key)))
    if optimizer.origin is not None:
        origin = optimizer.origin
        tensors |= _prefixed("origin", engine.gather(lambda i: origin[i]))
    if usage is not None:
        tensors["usage"] = usage.float().cpu().contiguous()
    state = CheckpointState(
        stage=stage,
        step=step,
        num_steps=num_steps,
        unit_steps=optimizer.steps.tolist(),
        cursor=dict(cursor),
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    )
    return Checkpoint(state, tensors)


def restore_optimizer(engine: StageEngine, checkpoint: Checkpoint) -> None:
    """Moments, step counts and theta(0) of a checkpoint into a fresh engine, whatever its layout."""
    optimizer = engine.optimizer
    for key in MOMENTS:
        engine.scatter(checkpoint.group(key), partial(optimizer.moment, key))
    optimizer.steps.copy_(torch.tensor(checkpoint.state.unit_steps))
    whole_origin = checkpoint.group("origin")
    if whole_origin:
        optimizer.hold_origin()
        origin = optimizer.origin
        assert origin is not None
        engine.scatter(whole_origin, lambda i: origin[i])


def load_weights(mixture: Mixture, weights: Mapping[str, torch.Tensor]) -> None:
    """Weights of a checkpoint into a mixture that has no engine; a collective where ZeRO-3 partitioned it."""
    own = dict([*mixture.expert_parameters(), *mixture.router_parameters()])
    local = list(mixture.placement.layout.local)
    for name, tensor in weights.items():
        groups.set_parameter(own[name], tensor[local] if groups.is_bank(name) else tensor)


def whole_weights(mixture: Mixture) -> dict[str, torch.Tensor]:
    """All experts and routers, whole, on the CPU, by parameter name; a collective."""
    named = [*mixture.expert_parameters(), *mixture.router_parameters()]
    return {name: groups.whole_parameter(name, parameter, mixture.placement) for name, parameter in named}


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}
