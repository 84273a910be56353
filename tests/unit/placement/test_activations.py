"""The formula for activations against what autograd really saves, on small real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsmixer.losses.task import token_losses
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.load import checkpoint_activations
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.shape import model_shape
from dsmixer.placement.activations import activation_bytes, layer_bytes, logit_bytes, working_bytes
from dsmixer.placement.memory import Layout, rank_bytes
from dsmixer.placement.owners import owners_of, pack_slots
from dsmixer.placement.request import Cluster, PlanRequest, Pool, StageShape
from dsmixer.routing.context import BatchRouting
from dsmixer.routing.modes import Routing

EXPERTS = ("a", "b", "c", "d")
ROWS, LENGTH = 2, 32
STAGE1 = StageShape("stage1", ROWS, LENGTH, 1, trains_experts=True, trains_routers=False)
STAGE2 = StageShape("stage2", ROWS, LENGTH, 1, trains_experts=True, trains_routers=True, top_k=2)


def saved_bytes(mixture: Mixture, routing: Routing) -> int:
    """Bytes of every piece of memory that the forward pass saves, the model's own tensors left out."""
    model = mixture.model.train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 200, (ROWS, LENGTH))
    batch = BatchRouting(expert_ids_T=torch.zeros(ids.numel(), dtype=torch.int64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with mixture.context.routed(routing), mixture.context.recording(batch):
            logits = model(input_ids=ids, use_cache=False).logits
            token_losses(logits, ids).sum()
    return sum(saved.values())


def small_llama(dtype: torch.dtype, checkpointing: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    if checkpointing:
        checkpoint_activations(model)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [STAGE1, STAGE2], ids=["stage1", "stage2"])
def test_the_formula_is_close_to_what_autograd_saves(
    stage: StageShape, dtype: torch.dtype, checkpointing: bool
) -> None:
    """Within a tenth. The plan adds what comes and goes: logits, and checkpointed the layer run again."""
    model = small_llama(dtype, checkpointing)
    plan = PlanRequest(
        model=model_shape(model, "qkvo"),
        pool=Pool((8,) * len(EXPERTS), (1.0,) * len(EXPERTS)),
        cluster=Cluster(1),
        stages=(stage,),
        base_bytes=torch.finfo(dtype).bits // 8,
        checkpointing=checkpointing,
    )
    mixture = attach_mixers(model, MixerConfig("qkvo", EXPERTS, rank=8, top_k=2))
    routing = mixture.config.default_routing() if stage.top_k else Routing(mode="hard")
    log_softmax = ROWS * LENGTH * 256 * 4
    expected = activation_bytes(plan, stage) - logit_bytes(plan, stage) + log_softmax
    if checkpointing:
        expected -= layer_bytes(plan, stage)
    found = saved_bytes(mixture, routing)
    print(found, expected, found / expected)
    assert found == pytest.approx(expected, rel=0.1)


def test_travelling_tokens_are_kept_by_the_rank_that_received_them() -> None:
    """Four layers of width 64 in float32: q, k, v and o receive what two blocks read; 64 tokens."""
    model = model_shape(small_llama(torch.float32, False), "qkvo")
    plan = PlanRequest(model, Pool((8,) * 4, (1.0,) * 4), Cluster(4), (STAGE1,), base_bytes=4)
    blocks, each = 4 * 2 * 64 * 4, 4 * 4 * 64 * 4
    arriving = 1.75
    more = activation_bytes(plan, STAGE2, arriving) - activation_bytes(plan, STAGE2)
    assert more == 64 * arriving * each, "the routers keep the blocks' input beside it"
    shared = replace(plan, pool=replace(plan.pool, router="per_block"))
    more = activation_bytes(shared, STAGE2, arriving) - activation_bytes(shared, STAGE2)
    assert more == 64 * arriving * blocks
    moved = working_bytes(plan, STAGE2, 4, 1.0) - working_bytes(plan, STAGE2, 4)
    assert moved == 64 * 2 * 4 * (64 + 64)


def test_stage_one_keeps_no_travelling_tokens() -> None:
    model = model_shape(small_llama(torch.float32, False), "qkvo")
    plan = PlanRequest(model, Pool((8,) * 4, (1.0,) * 4), Cluster(4), (STAGE1,), base_bytes=4)
    spread = Layout("tokens", 1, owners_of(pack_slots((1.0,) * 4, 4), 4))
    assert rank_bytes(plan, spread, STAGE1).activations == activation_bytes(plan, STAGE1)
    assert rank_bytes(plan, spread, STAGE2).activations > activation_bytes(plan, STAGE2)


def test_checkpointing_and_short_rows_keep_less_and_dropout_keeps_more() -> None:
    model = model_shape(small_llama(torch.float32, False), "qkvo")
    plan = PlanRequest(model, Pool((8,) * 4, (1.0,) * 4), Cluster(1), (STAGE1,), base_bytes=4)
    whole = activation_bytes(plan, STAGE1)
    assert activation_bytes(replace(plan, checkpointing=True), STAGE1) < whole
    assert activation_bytes(plan, replace(STAGE1, max_length=LENGTH // 2)) * 2 == whole
    assert activation_bytes(replace(plan, dropout=True), STAGE1) > whole
    assert working_bytes(plan, STAGE1, 400) > working_bytes(plan, STAGE1, 4)
