"""One rank of ``dist/test_exchange.py``: tokens travel to the experts of four ranks, and every collective is
recorded on its way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.placement.exchange import Dispatched, Exchange, LocalExchange, Placement, token_placement
from dsmixer.placement.groups import expert_parallel_group
from dsmixer.placement.layout import ExpertLayout, everything_here

RANKS = 4
IN, OUT = 6, 10
RANK_OF_EXPERT = (8, 3, 8, 5, 2)
EXPERTS = len(RANK_OF_EXPERT)
FOUR = ((3, 0), (4,), (1,), (2,))
TWO = ((2, 0, 4), (1, 3))
TOKENS = (11, 7, 16, 9)
ROUTERS = ("per_projection", "per_block")


@dataclass(frozen=True)
class Case:
    """What the ranks send.

    Attributes:
        owned: experts of each rank of a group.
        top_k: K; None for a full gate.
        tokens: of each rank.
        absent: share of the pairs that name no expert.
        silent: ranks whose tokens all go to nobody.
        only: the experts that are chosen at all.
        compute: the form that the experts are computed in.
    """

    owned: tuple[tuple[int, ...], ...] = FOUR
    top_k: int | None = 2
    tokens: tuple[int, ...] = TOKENS
    absent: float = 0.0
    silent: tuple[int, ...] = ()
    only: tuple[int, ...] = tuple(range(EXPERTS))
    compute: str = "loop"

    def group_of(self, rank: int) -> range:
        """The ranks that ``rank`` exchanges tokens with, itself among them."""
        size = len(self.owned)
        first = rank // size * size
        return range(first, first + size)


CASES = {
    "ep4-k1": Case(FOUR, 1, compute="loop"),
    "ep4-k2": Case(FOUR, 2, compute="dense"),
    "ep4-k3": Case(FOUR, 3, compute="grouped"),
    "ep2-k1": Case(TWO, 1, compute="grouped"),
    "ep2-k2": Case(TWO, 2, compute="loop"),
    "ep2-k3": Case(TWO, 3, compute="dense"),
    "absent-pairs": Case(FOUR, 3, absent=0.4, compute="grouped"),
    "absent-pairs-ep2": Case(TWO, 3, absent=0.4),
    "a-rank-with-tokens-for-nobody": Case(FOUR, 2, silent=(2,), compute="grouped"),
    "a-rank-without-tokens": Case(FOUR, 2, tokens=(11, 0, 16, 9), compute="dense"),
    "an-expert-nobody-chose": Case(FOUR, 2, only=(0, 2, 3, 4), compute="grouped"),
    "a-rank-nobody-asks": Case(TWO, 2, only=(0, 2, 4), compute="dense"),
    "all-to-one-expert": Case(FOUR, 1, only=(4,), compute="grouped"),
    "nobody-asks-anybody": Case(FOUR, 2, silent=(0, 1, 2, 3), compute="grouped"),
    "full-gate": Case(FOUR, None, compute="dense"),
    "full-gate-ep2": Case(TWO, None, compute="grouped"),
}


@dataclass(frozen=True)
class Inputs:
    """Of one rank: tokens, pairs (or a gate, without ``indices_TK``), and the gradient that comes back.

    Weights are of float32's values, because pairs travel as float32.
    """

    x_TD: torch.Tensor
    indices_TK: torch.Tensor | None
    weights: torch.Tensor
    grad_TO: torch.Tensor


def inputs(case: Case, rank: int) -> Inputs:
    """The same in every process."""
    draw = torch.Generator().manual_seed(1000 + rank)
    num_tokens = case.tokens[rank]
    x_TD = torch.randn(num_tokens, IN, generator=draw, dtype=torch.float64)
    grad_TO = torch.randn(num_tokens, OUT, generator=draw, dtype=torch.float64)
    if case.top_k is None:
        gate_TE = torch.rand(num_tokens, EXPERTS, generator=draw)
        return Inputs(x_TD, None, gate_TE.double(), grad_TO)
    among = torch.tensor(case.only)
    orders_T = [torch.randperm(len(among), generator=draw)[: case.top_k] for _ in range(num_tokens)]
    indices_TK = among[torch.stack(orders_T)] if orders_T else torch.zeros(0, case.top_k, dtype=torch.long)
    gone_TK = torch.rand(indices_TK.shape, generator=draw) < (1.0 if rank in case.silent else case.absent)
    weights_TK = torch.rand(indices_TK.shape, generator=draw)
    return Inputs(x_TD, indices_TK.masked_fill(gone_TK, -1), weights_TK.double(), grad_TO)


def bank_of(experts: tuple[int, ...], compute: str) -> ExpertBank:
    """Some experts of the one pool, float64, with weights of their own."""
    names = [f"expert{e}" for e in experts]
    ranks = [RANK_OF_EXPERT[e] for e in experts]
    bank = ExpertBank(names, IN, OUT, ranks=ranks, alphas=[16.0] * len(ranks), compute=compute, rank=8)
    bank.double()
    for place, (e, rank) in enumerate(zip(experts, ranks, strict=True)):
        draw = torch.Generator().manual_seed(e)
        lora_a = torch.randn(rank, IN, generator=draw, dtype=torch.float64)
        bank.set_expert(place, lora_a, torch.randn(OUT, rank, generator=draw, dtype=torch.float64))
    return bank


def run_case(case: Case, rank: int, bank: ExpertBank, exchange: Exchange) -> dict[str, torch.Tensor]:
    """Forward and backward of one rank: the output, and the gradients of all that has one."""
    given = inputs(case, rank)
    x_TD, weights = given.x_TD.requires_grad_(), given.weights.requires_grad_()
    if given.indices_TK is None:
        assignment = Assignment(EXPERTS, gate_TE=weights)
    else:
        assignment = Assignment(EXPERTS, indices_TK=given.indices_TK, weights_TK=weights)
    sent = exchange.dispatch(x_TD, assignment)
    y_TO = exchange.combine(bank(sent.x_MD, sent.assignment), sent)
    y_TO.backward(given.grad_TO)
    grads = {"x": x_TD.grad, "weights": weights.grad, "A": bank.lora_A.grad, "B": bank.lora_B.grad}
    found = {name: grad for name, grad in grads.items() if grad is not None}
    bank.zero_grad()
    return {"y": y_TO.detach(), **found}


@contextmanager
def recorded() -> Iterator[list[list[int]]]:
    """Bytes that this rank hands to each rank of the group, for every all-to-all that goes by, itself too."""
    calls: list[list[int]] = []
    real = dist.all_to_all_single

    def recording(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        world = dist.get_world_size(group)
        splits = input_split_sizes or [input.shape[0] // world] * world
        width = input[0].numel() if input.shape[0] else 0
        calls.append([rows * width * input.element_size() for rows in splits])
        return real(output, input, output_split_sizes, input_split_sizes, group=group, async_op=async_op)

    dist.all_to_all_single = recording
    try:
        yield calls
    finally:
        dist.all_to_all_single = real


class RoundedPairs(LocalExchange):
    """All experts are here, and weights of pairs lose what they would lose on their way."""

    def dispatch(self, x_TD: torch.Tensor, assignment: Assignment) -> Dispatched:
        assert assignment.weights_TK is not None
        rounded_TK = assignment.weights_TK.float().to(assignment.weights_TK.dtype)
        return super().dispatch(x_TD, replace(assignment, weights_TK=rounded_TK))


def small_mixture(router: str, placement: Placement) -> Mixture:
    """Two layers with mixers on q, k, v and o, the same weights wherever the experts are; float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    names = [f"expert{e}" for e in range(EXPERTS)]
    mixer = MixerConfig(["q", "k", "v", "o"], names, rank=8, router=router, router_std=1.0, top_k=2)
    mixture = attach_mixers(model, mixer, placement)
    local = mixture.placement.layout.local
    for index, (_, parameter) in enumerate(mixture.expert_parameters()):
        draw = torch.Generator().manual_seed(index)
        whole = torch.randn(EXPERTS, *parameter.shape[1:], generator=draw)
        parameter.data.copy_(0.2 * whole[list(local)])
    return mixture


def run_model(mixture: Mixture, rank: int) -> dict[str, Any]:
    """Forward and backward on this rank's own rows."""
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(rank))
    with recorded() as calls:
        logits = mixture.model(input_ids=ids, use_cache=False).logits
    forward = len(calls)
    logits.square().mean().backward()
    parameters = [*mixture.expert_parameters(), *mixture.router_parameters()]
    return {
        "logits": logits.detach(),
        "grads": {name: parameter.grad for name, parameter in parameters},
        "forward_calls": forward,
    }


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        size = len(case.owned)
        placement = token_placement(ExpertLayout(case.owned, rank % size), expert_parallel_group(size), "cpu")
        bank = bank_of(placement.layout.local, case.compute)
        with recorded() as calls:
            found[name] = run_case(case, rank, bank, placement.exchange)
        found[name]["calls"] = calls
    for router in ROUTERS:
        spread = token_placement(ExpertLayout(FOUR, rank), expert_parallel_group(RANKS), "cpu")
        here = Placement(everything_here(EXPERTS), RoundedPairs())
        found[router] = {
            "here": run_model(small_mixture(router, here), rank),
            "spread": run_model(small_mixture(router, spread), rank),
        }
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # the launcher puts --local_rank before the arguments
    main(Path(sys.argv[-1]))
