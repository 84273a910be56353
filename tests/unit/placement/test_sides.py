"""The formula for an encoder-decoder model's activations against what autograd really saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from dsmixer.losses.task import target_losses
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.load import checkpoint_activations
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.shape import model_shape
from dsmixer.placement.activations import activation_bytes, logit_bytes
from dsmixer.placement.request import Cluster, PlanRequest, Pool, StageShape
from dsmixer.routing.context import BatchRouting
from dsmixer.routing.modes import Routing

EXPERTS = ("a", "b", "c", "d")
ROWS, LENGTH = 2, 32
STAGE1 = StageShape("stage1", ROWS, LENGTH, 1, trains_experts=True, trains_routers=False)
STAGE2 = StageShape("stage2", ROWS, LENGTH, 1, trains_experts=True, trains_routers=True, top_k=2)


def small_t5(dtype: torch.dtype = torch.float32, **kind: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        d_model=64,
        d_kv=16,
        d_ff=160,
        num_layers=4,
        num_decoder_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **{"feed_forward_proj": "gated-gelu", "vocab_size": 256, **kind},
    )
    return T5ForConditionalGeneration(config).to(dtype)


def saved_bytes(mixture: Mixture, mode: str) -> int:
    """Bytes of every piece of memory that a forward pass saves, the model's own left out."""
    model: Any = mixture.model.train()
    for _, parameter in (*mixture.expert_parameters(), *mixture.router_parameters()):
        parameter.requires_grad_(True)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids, mask = torch.randint(3, 200, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[1, -3:] = 0  # without padding there would be no mask
    of_side = [BatchRouting(expert_ids_T=torch.zeros(ids.numel(), dtype=torch.int64)) for _ in range(2)]
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        mixture.context.routed(Routing(mode=mode, top_k=2)),
        mixture.context.recording(replace(of_side[0], encoder=of_side[1])),
    ):
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
        target_losses(model(**given, use_cache=False).logits, ids).sum()
    return sum(saved.values())


def assert_predicted(model: T5ForConditionalGeneration, mode: str, router: str = "per_projection") -> None:
    """Saved bytes against the plan's, both without the logits and what is made of them."""
    stage = STAGE1 if mode == "hard" else STAGE2
    plan = PlanRequest(
        model=model_shape(model, "qkvo"),
        pool=Pool((8,) * len(EXPERTS), (1.0,) * len(EXPERTS), router=router),
        cluster=Cluster(1),
        stages=(stage,),
        base_bytes=torch.finfo(model.dtype).bits // 8,
        checkpointing=model.is_gradient_checkpointing,
    )
    mixture = attach_mixers(model, MixerConfig("qkvo", EXPERTS, rank=8, top_k=2, router=router))
    expected = activation_bytes(plan, stage) - logit_bytes(plan, stage)
    found = saved_bytes(mixture, mode) - ROWS * LENGTH * model.config.vocab_size * plan.base_bytes
    print(f"{mode}: {found} saved, {expected} predicted: {found / expected:.3f}")
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.parametrize("mode", ["hard", "topk"])
def test_the_formula_is_what_autograd_saves(mode: str, router: str, dtype: torch.dtype) -> None:
    """Within 5 %, with rows that are padded."""
    assert_predicted(small_t5(dtype), mode, router)


@pytest.mark.parametrize("feed_forward", ["relu", "gated-relu", "gelu_new", "gated-silu"])
def test_other_feed_forward_parts_keep_what_the_plan_says(feed_forward: str) -> None:
    assert_predicted(small_t5(feed_forward_proj=feed_forward), "topk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["hard", "topk"])
def test_layers_that_are_run_again_keep_their_inputs_and_biases(mode: str, dtype: torch.dtype) -> None:
    """With so many logits that these, and not the layer run again, are the most that comes and goes."""
    model = small_t5(dtype, vocab_size=4096)
    checkpoint_activations(model)
    assert_predicted(model, mode)
