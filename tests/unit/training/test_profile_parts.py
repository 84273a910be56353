"""Every product of a pass, forward and backward, is counted in the part that its widths say it belongs to.

The clock here goes by products, not by seconds: each that torch runs moves it on by one. Which part a product
is of follows from its shape alone, because no two parts share a width.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmixer import MixerConfig, attach_mixers
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.model.inject import Mixture
from dsmixer.model.load import checkpoint_activations
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.routing.context import BatchRouting
from dsmixer.training.profile.clock import PROFILING, Clock
from dsmixer.training.profile.ranges import calls_of_model, origins_of, timed_calls

EXPERTS, RANK, TOKENS = 5, 8, 7
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
SOFTMAX = {
    torch.ops.aten._softmax.default,
    torch.ops.aten._softmax_backward_data.default,
    torch.ops.aten._log_softmax.default,
    torch.ops.aten._log_softmax_backward_data.default,
    torch.ops.aten.topk.default,
}


class Products(TorchDispatchMode):
    """Counts products, softmaxes and choices by part; ``now`` is how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def now(self) -> float:
        return float(sum(self.counted.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if func in PRODUCTS:
            self.counted[self.part({width for tensor in tensors for width in tensor.shape})] += 1
        elif func in SOFTMAX:
            self.counted["router" if tensors[0].shape[-1] == EXPERTS else "base"] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def part(widths: set[int]) -> str:
        if EXPERTS * RANK in widths:
            return "mixers"
        return "router" if EXPERTS in widths else "base"


def tiny_mixture(*, checkpointing: bool, router: str) -> Mixture:
    config = LlamaConfig(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if checkpointing:
        checkpoint_activations(model)
    names = [f"e{i}" for i in range(EXPERTS)]
    mixed = MixerConfig(
        targets=["q", "k", "v", "down"],
        experts=names,
        rank=RANK,
        alpha=6,
        top_k=2,
        compute="dense",
        router=router,
    )
    mixture = attach_mixers(model, mixed)
    model.requires_grad_(False)
    for _, parameter in (*mixture.expert_parameters(), *mixture.router_parameters()):
        parameter.requires_grad_(True)
    model.train()
    return mixture


def objective(mixture: Mixture, ids: torch.Tensor) -> torch.Tensor:
    loss = RoutingSpecializationLoss()
    even = torch.full((EXPERTS,), 1 / EXPERTS)
    with mixture.context.recording(BatchRouting(), router_loss=lambda output, index: loss(output, even, 1.0)):
        task: torch.Tensor = mixture.model(input_ids=ids, labels=ids, use_cache=False).loss
    routing = mixture.context.take_loss()
    assert routing is not None
    return task + 0.1 * routing


def gradients(mixture: Mixture) -> list[torch.Tensor]:
    found = [p.grad for _, p in (*mixture.expert_parameters(), *mixture.router_parameters())]
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


def names_of(mixture: Mixture) -> dict[str, set[str]]:
    """The attributes that each module, and the context, has of its own."""
    modules = {name: set(vars(module)) for name, module in mixture.model.named_modules()}
    return {**modules, "context": set(vars(mixture.context))}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("router", ["per_projection", "per_block"])
def test_both_passes_are_counted_by_part_and_change_nothing(checkpointing: bool, router: str) -> None:
    ids = torch.randint(3, 40, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    plain = tiny_mixture(checkpointing=checkpointing, router=router)
    loss = objective(plain, ids)
    loss.backward()

    mixture = tiny_mixture(checkpointing=checkpointing, router=router)
    engine = SimpleNamespace(backward=lambda loss: loss.backward())
    before, forward = names_of(mixture), MixedLinear.forward
    with Products() as products:
        clock = Clock(torch.device("cpu"), products.now)
        with timed_calls(calls_of_model(mixture), engine, origins_of(mixture), clock):
            clock.start()
            depth = clock.enter("base")
            engine.backward(objective(mixture, ids))
            clock.leave(depth)
            seconds, _ = clock.stop()
    assert products.counted["mixers"] and products.counted["router"] and products.counted["base"]
    assert {part: count for part, count in seconds.items() if count} == dict(products.counted)
    assert seconds.get(PROFILING, 0.0) == 0.0

    assert all(map(torch.equal, gradients(mixture), gradients(plain)))
    assert names_of(mixture) == before and MixedLinear.forward is forward, "nothing of the profile is left"
