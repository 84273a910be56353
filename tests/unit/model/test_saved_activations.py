"""What the mixers of a block keep for the backward pass: their input once, and E or K numbers a token.

Counted with saved-tensor hooks: every piece of memory once, the model's own left out. The form ``loop`` is
the reference that others are held to and promises nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsmixer.experts.bank import ExpertBank
from dsmixer.losses.balance import routing_losses
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.placement.exchange import Exchange, LocalExchange, token_placement
from dsmixer.placement.layout import ExpertLayout
from dsmixer.routing.context import BatchRouting, RoutingContext
from dsmixer.routing.modes import Routing
from dsmixer.routing.router import Router
from dsmixer.routing.statistics import RoutingStatistics

T, D, E, R, K = 128, 64, 6, 32, 2
WIDTHS = (48, 24, 24)
"""O of q, k and v."""

CONSTANT = 1024
"""Bytes that do not grow with tokens: scalings, usages, scalars."""

NUMBERS = {
    "topk": 4 * E + 12 * K + 4,
    "soft": 4 * E,
    "hard_soft": 4 * E + 4 * E,
    "top_p": 4 * E + 5 * E + 4,
}
"""Bytes a token and router: p; ids, weights and their sum for topk; gate, its mask and sum for the others."""


@dataclass(frozen=True)
class Block:
    """q, k and v over one input."""

    mixers: list[MixedLinear]
    context: RoutingContext

    @property
    def own(self) -> set[int]:
        """Memory of the weights."""
        return {p.untyped_storage().data_ptr() for mixer in self.mixers for p in mixer.parameters()}


def make_block(
    dtype: torch.dtype,
    *,
    compute: str = "auto",
    dropout: float = 0.0,
    router: str = "per_projection",
    mode: str = "topk",
    exchange: Exchange | None = None,
) -> Block:
    torch.manual_seed(0)
    context = RoutingContext(E, Routing(mode=mode, top_k=K))
    routers = [Router(E, D) for _ in WIDTHS]
    mixers = []
    for index, width in enumerate(WIDTHS):
        number = 0 if router == "per_block" else index
        bank = ExpertBank("abcdef", D, width, ranks=[R] * E, alphas=[8.0] * E, compute=compute)
        mixer = MixedLinear(
            nn.Linear(D, width).to(dtype).requires_grad_(False),
            bank,
            routers[number],
            router_index=number,
            context=context,
            exchange=exchange or LocalExchange(),
            dropout=dropout,
            shared=router == "per_block",
            owns_router=router == "per_projection" or index == 0,
        )
        for parameter in (bank.lora_A, bank.lora_B, routers[index].weight):
            nn.init.normal_(parameter, std=0.3)
        mixers.append(mixer)
    return Block(mixers, context)


def kept_by(block: Block) -> dict[int, int]:
    """Bytes of each piece of memory that a training forward pass keeps; the input's comes first."""
    dtype = block.mixers[0].base.weight.dtype
    # a tensor that has a history, as hidden states have, laid out as rows
    x = torch.randn(2, T // 2, D, requires_grad=True).to(dtype) + 0
    pieces = {x.untyped_storage().data_ptr(): 0}
    alive, own = [], block.own
    loss = routing_losses["rsl"]()
    usage_E = torch.full((E,), 1 / E)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            pieces[memory.data_ptr()] = memory.nbytes()
        return tensor

    batch = BatchRouting(expert_ids_T=torch.arange(T) % E, mask_T=torch.ones(T))
    statistics = RoutingStatistics(len(WIDTHS), E)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with block.context.recording(batch, statistics, lambda out, index: loss(out, usage_E, 1.0)):
            outputs = [mixer(x) for mixer in block.mixers]
    routing = block.context.take_loss()
    parts = [y.float().sum() for y in outputs] + ([] if routing is None else [routing])
    torch.stack(parts).sum().backward()  # what was counted is what the backward pass needs
    for mixer in block.mixers:
        assert mixer.bank.lora_A.grad is not None and mixer.bank.lora_A.grad.any()
    return pieces


def split(pieces: dict[int, int]) -> tuple[int, list[int]]:
    """The input's bytes, and those of the rest."""
    own, *rest = pieces.values()
    return own, rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", ["dense", "grouped", "auto"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.parametrize("mode", ["topk", "soft", "hard_soft", "top_p", "hard"])
def test_q_k_and_v_keep_their_input_once_and_e_or_k_numbers_a_token(
    mode: str, router: str, dropout: float, compute: str, dtype: torch.dtype
) -> None:
    block = make_block(dtype, compute=compute, dropout=dropout, router=router, mode=mode)
    inputs, rest = split(kept_by(block))
    size = torch.finfo(dtype).bits // 8
    assert inputs == T * D * size
    # the next largest thing is a router's E numbers of up to 8 bytes, for each token
    assert max(rest) <= 8 * T * E < size * T * min(D, E * R, E * min(WIDTHS))
    routers = 1 if router == "per_block" else len(WIDTHS)
    # stage one's ids and weights are one for all; beside them the mask of real tokens
    numbers = 12 if mode == "hard" else routers * NUMBERS[mode] + 4
    assert T * numbers / 2 <= sum(rest) <= T * numbers + CONSTANT


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Exchange]:
    """An exchange whose group is this process: every token travels to itself."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield token_placement(ExpertLayout((tuple(range(E)),), 0), group, "cpu").exchange
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_tokens_that_travel_are_kept_where_they_arrive_and_dropout_adds_nothing(
    alone: Exchange, dropout: float, router: str, dtype: torch.dtype
) -> None:
    block = make_block(dtype, dropout=dropout, router=router, exchange=alone)
    inputs, rest = split(kept_by(block))
    size = torch.finfo(dtype).bits // 8
    assert inputs == T * D * size, "for the routers"
    dispatches = 1 if router == "per_block" else len(WIDTHS)
    arrived = [piece for piece in rest if piece >= T * D * size]
    assert arrived == [T * D * size] * dispatches
    numbers = NUMBERS["topk"] + 16 * K + 8 + K
    assert sum(rest) - sum(arrived) <= T * (dispatches * numbers + 4) + CONSTANT


def test_stage_one_in_tokens_mode_keeps_the_shared_input_with_dropout_too(alone: Exchange) -> None:
    """Nothing travels there, so no dropped copy is needed."""
    block = make_block(torch.float32, dropout=0.1, mode="hard", exchange=alone)
    inputs, rest = split(kept_by(block))
    assert inputs == T * D * 4 and sum(rest) <= 12 * T + CONSTANT


def test_in_bfloat16_no_cast_of_a_router_or_a_bank_is_kept() -> None:
    """Kept casts would grow with the pool, however few tokens there are."""
    block = make_block(torch.bfloat16)
    _, rest = split(kept_by(block))
    assert not {2 * E * D, 2 * E * R * D, *(2 * E * R * width for width in WIDTHS)} & set(rest)
