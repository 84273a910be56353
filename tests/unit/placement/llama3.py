"""LLaMA3-8B on the meta device, and plan requests over it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsmixer.model.shape import model_shape
from dsmixer.placement.memory import Layout
from dsmixer.placement.owners import owners_of, pack_slots
from dsmixer.placement.request import Cluster, ModelShape, PlanRequest, Pool, StageShape

STAGE1 = StageShape("stage1", 1, 1024, 4, trains_experts=True, trains_routers=False)
STAGE2 = StageShape("stage2", 1, 1024, 4, True, True, keeps_origin=True, top_k=3)


def llama3_8b() -> LlamaForCausalLM:
    """No weights."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@cache
def llama3_shape() -> ModelShape:
    return model_shape(llama3_8b(), ["q", "k", "v", "o"])


def layout(mode: str, zero_stage: int, ep: int, num_experts: int) -> Layout:
    """``num_experts`` experts with as much data each, over ``ep`` ranks."""
    return Layout(mode, zero_stage, owners_of(pack_slots((1.0,) * num_experts, ep), ep))


def request(num_experts: int, world_size: int, memory: float | None = None, **changes: Any) -> PlanRequest:
    """Rank 64, both stages, bf16, layers checkpointed; ``memory`` in GiB."""
    router = changes.pop("router", "per_projection")
    cluster = Cluster(world_size, device_memory=None if memory is None else int(memory * 2**30))
    values: dict[str, Any] = {"stages": (STAGE1, STAGE2), "checkpointing": True, **changes}
    pool = Pool((64,) * num_experts, (1.0,) * num_experts, router=router)
    return PlanRequest(llama3_shape(), pool, cluster, **values)
