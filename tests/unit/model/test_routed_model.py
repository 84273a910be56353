"""Routers inside a real model: one for each projection, or one for q, k, v, against a count by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from dsmixer.model.inject import Mixture, attach_mixers, route_by
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.routing.context import BatchRouting
from dsmixer.routing.modes import Routing
from dsmixer.routing.statistics import RoutingStatistics

TinyModel = Callable[..., PreTrainedModel]


def generate(model: Any, **options: object) -> torch.Tensor:
    """Eight tokens by greedy search, no early end."""
    new: torch.Tensor = model.generate(
        tokens(), max_new_tokens=8, do_sample=False, eos_token_id=None, **options
    )
    return new


def mixture_on(model: PreTrainedModel, **options: object) -> Mixture:
    config = MixerConfig("qkvo", "abcd", rank=4, alpha=8, router_std=0.5, **options)  # type: ignore[arg-type]
    mixture = attach_mixers(model, config)
    torch.manual_seed(1)
    for _, parameter in mixture.expert_parameters():
        nn.init.normal_(parameter, std=0.1)
    return mixture


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 60, (rows, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("router", "num_routers"), [("per_projection", 8), ("per_block", 4)])
def test_statistics_of_every_router_equal_a_count_from_what_its_projection_read(
    tiny: TinyModel, router: str, num_routers: int
) -> None:
    model = tiny("llama")
    mixture = mixture_on(model, router=router)
    read: dict[str, torch.Tensor] = {}
    for path, mixer in mixture.mixers.items():
        mixer.register_forward_pre_hook(
            lambda _, args, path=path: read.__setitem__(path, args[0].flatten(0, 1))
        )
    statistics = RoutingStatistics(len(mixture.routers), 4)
    mask_T = torch.ones(12)
    mask_T[5] = 0
    with mixture.context.recording(BatchRouting(mask_T=mask_T), statistics):
        model(input_ids=tokens())
    assert len(mixture.routers) == num_routers
    assert statistics.tokens_M.tolist() == [11.0] * num_routers
    for index, (path, own) in enumerate(mixture.routers.items()):
        p_TE = torch.softmax(read[path].double() @ own.weight.double().T, 1) * mask_T[:, None]
        torch.testing.assert_close(statistics.p_ME[index].double(), p_TE.sum(0), rtol=1e-4, atol=1e-5)


def test_a_shared_router_is_one_weight_and_equals_three_copies_of_it(tiny: TinyModel) -> None:
    shared = mixture_on(tiny("llama"), router="per_block")
    apart = mixture_on(tiny("llama"), router="per_projection")
    assert sum(p.numel() for _, p in shared.router_parameters()) == 2 * 2 * 4 * 32
    assert sum(".router." in name for name, _ in shared.model.named_parameters()) == 4
    with torch.no_grad():
        for path, router in apart.routers.items():
            owner = path.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            router.weight.copy_(shared.routers[owner].weight)
    assert torch.equal(shared.model(input_ids=tokens()).logits, apart.model(input_ids=tokens()).logits)


def test_a_mixed_projection_equals_the_sum_over_chosen_experts_by_hand(tiny: TinyModel) -> None:
    mixture = mixture_on(tiny("llama"))
    mixer = mixture.mixers["model.layers.1.self_attn.v_proj"]
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    y = mixer(x).flatten(0, 1)
    router = mixture.routers["model.layers.1.self_attn.v_proj"]
    for t, token in enumerate(x.flatten(0, 1)):
        p = torch.softmax(router.weight @ token, 0)
        best = p.argsort(descending=True)[:3]
        expected = mixer.base.weight @ token
        for e in best:
            low = mixer.bank.lora_A[e] @ token
            expected = expected + p[e] / p[best].sum() * 2.0 * (mixer.bank.lora_B[e].T @ low)
        torch.testing.assert_close(y[t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_generation_with_the_cache_equals_generation_without(
    tiny: TinyModel, router: str, inference_mode: bool
) -> None:
    model = tiny("llama")
    mixture_on(model, router=router)
    with torch.inference_mode(inference_mode):
        cached = generate(model, use_cache=True)
        assert torch.equal(cached, generate(model, use_cache=False))
    assert cached.shape == (2, 14)


def test_routing_is_a_property_of_the_token_not_of_the_batch(tiny: TinyModel) -> None:
    model = tiny("llama")
    mixture_on(model, router="per_block")
    both = model(input_ids=tokens()).logits
    torch.testing.assert_close(model(input_ids=tokens()[1:]).logits[0], both[1])


@pytest.mark.parametrize("mode", ["soft", "hard_soft", "top_p", "uniform"])
def test_other_modes_answer_and_the_default_returns(tiny: TinyModel, mode: str) -> None:
    model = tiny("llama")
    mixture_on(model)
    default = model(input_ids=tokens()).logits
    with route_by(model, Routing(mode=mode, top_k=3)):
        other = model(input_ids=tokens()).logits
    # hard_soft is topk in its forward pass
    assert torch.allclose(other, default, atol=1e-5) is (mode == "hard_soft")
    assert torch.equal(model(input_ids=tokens()).logits, default)


def test_start_is_the_same_for_a_router_whatever_else_is_attached(tiny: TinyModel) -> None:
    few = attach_mixers(tiny("llama"), MixerConfig(["v"], "ab", rank=4))
    many = attach_mixers(tiny("llama"), MixerConfig("qkvo", "ab", rank=4))
    for path, router in few.routers.items():
        assert torch.equal(router.weight, many.routers[path].weight)
        assert router.weight.std() > 0
    first, second = (r.weight for r in few.routers.values())
    assert not torch.equal(first, second)
