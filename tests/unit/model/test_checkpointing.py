"""Activation checkpointing runs every layer twice and must change nothing, statistics included."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from dsmixer.losses.balance import routing_losses
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.routing.context import BatchRouting
from dsmixer.routing.modes import Routing
from dsmixer.routing.statistics import RoutingStatistics

TinyModel = Callable[..., PreTrainedModel]


class Step(NamedTuple):
    loss: float
    router_loss: float | None
    statistics: torch.Tensor
    gradients: dict[str, torch.Tensor]


def train_step(
    tiny: TinyModel, checkpointing: bool, router: str, mode: str, usage_from: str, compute: str = "grouped"
) -> Step:
    model = tiny("llama")
    config = MixerConfig(
        "qkvo", "abcd", rank=4, alpha=8, router=router, router_std=0.3, dropout=0.2, compute=compute
    )
    mixture = attach_mixers(model, config)
    torch.manual_seed(1)
    for _, parameter in mixture.expert_parameters():
        nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask_T = torch.ones(14)
    mask_T[-3:] = 0
    batch = BatchRouting(torch.arange(14) % 4, mask_T, torch.arange(14) % 2)
    statistics = RoutingStatistics(len(mixture.routers), 4, num_domains=2, smooth_temperature=1.0)
    rsl = routing_losses["rsl"](usage_from=usage_from)
    usage_E = torch.tensor([0.4, 0.3, 0.2, 0.1])
    with (
        mixture.context.routed(Routing(mode=mode, top_k=2)),
        mixture.context.recording(batch, statistics, lambda output, index: rsl(output, usage_E, 1.0)),
    ):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    router_loss = mixture.context.take_loss()
    with mixture.context.routed(Routing(mode=mode, top_k=2)):
        (loss if router_loss is None else loss + router_loss).backward()
    # the layers that ran again have left nothing behind that a loop could count
    assert mixture.context.take_loss() is None
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    value = None if router_loss is None else router_loss.item()
    return Step(loss.item(), value, statistics.buffer, gradients)


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.parametrize("mode", ["topk", "hard_soft", "top_p", "hard"])
@pytest.mark.parametrize("usage_from", ["previous_step", "micro_batch"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_checkpointing_on_equals_off_in_losses_gradients_and_statistics(
    tiny: TinyModel, router: str, mode: str, usage_from: str
) -> None:
    off = train_step(tiny, False, router, mode, usage_from)
    on = train_step(tiny, True, router, mode, usage_from)
    assert off.loss == on.loss and off.router_loss == on.router_loss
    assert torch.equal(off.statistics, on.statistics)
    assert off.gradients.keys() == on.gradients.keys()
    for name, gradient in off.gradients.items():
        torch.testing.assert_close(on.gradients[name], gradient, rtol=0, atol=0, msg=name)
    if mode == "hard":
        assert off.router_loss is None and not off.statistics.any()
    else:
        assert off.router_loss is not None
        num_routers = 8 if router == "per_projection" else 4
        # tokens are the last column before the counts by domain
        assert off.statistics[:, 6 * 4 + 1].tolist() == [11.0] * num_routers


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_what_runs_again_has_the_same_dropout_in_the_wide_product_too(tiny: TinyModel, router: str) -> None:
    off, on = (train_step(tiny, again, router, "topk", "previous_step", "dense") for again in (False, True))
    assert off.loss == on.loss
    for name, gradient in off.gradients.items():
        assert torch.equal(on.gradients[name], gradient), name
