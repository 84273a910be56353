"""Our optimizer on flat partitions against ``torch.optim.AdamW`` and ``clip_grad_norm_``, an expert each."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsmixer.placement.layout import everything_here
from dsmixer.placement.pieces import Piece, Shard
from dsmixer.training.moments import KINDS
from dsmixer.training.optimizer import AdamSettings, ExpertAdamW, StepPlan
from dsmixer.training.rows import spans_of

NUM_STEPS = 4


def shapes_of(num_experts: int) -> dict[str, tuple[int, ...]]:
    """Two projections of different widths, the first with the router."""
    return {
        "q.bank.lora_A": (num_experts, 2, 5),
        "q.bank.lora_B": (num_experts, 2, 3),
        "q.router.weight": (num_experts, 5),
        "o.bank.lora_A": (num_experts, 1, 4),
        "o.bank.lora_B": (num_experts, 1, 7),
    }


@dataclass(frozen=True)
class Scenario:
    """Where the flat parameters are cut, and which units (the routers last) a step reaches."""

    num_experts: int
    cuts: list[int]
    reached: list[list[bool]]
    clip: float | None
    weight_decay: float
    beta: float
    seed: int


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    num_experts = draw(st.integers(1, 4))
    numel = sum(math.prod(shape) for shape in shapes_of(num_experts).values())
    flags = st.lists(st.booleans(), min_size=num_experts + 1, max_size=num_experts + 1)
    return Scenario(
        num_experts,
        sorted(draw(st.sets(st.integers(1, numel - 1), max_size=6))),
        draw(st.lists(flags, min_size=NUM_STEPS, max_size=NUM_STEPS)),
        draw(st.sampled_from([None, 0.3, 3.0])),
        draw(st.sampled_from([0.0, 0.1])),
        draw(st.sampled_from([0.0, 0.2])),
        draw(st.integers(0, 1000)),
    )


class Partitioned:
    """Parameters as one flat run, cut into shards, dealt in turn to two ranks with an optimizer each."""

    def __init__(self, scenario: Scenario, start: dict[str, torch.Tensor], adam: AdamSettings) -> None:
        self.shapes = shapes_of(scenario.num_experts)
        flat = torch.cat([start[name].flatten() for name in self.shapes])
        bounds = [0, *scenario.cuts, flat.numel()]
        self.shards = [self._shard(flat, a, b) for a, b in itertools.pairwise(bounds)]
        dealt = (self.shards[::2], self.shards[1::2])
        self.ranks = [
            (ExpertAdamW([s.weights for s in own], everything_here(scenario.num_experts), adam), own)
            for own in dealt
            if own
        ]
        for optimizer, own in self.ranks:
            optimizer.bind(own)
            optimizer.hold_origin()

    def _shard(self, flat: torch.Tensor, low: int, high: int) -> Shard:
        pieces, offset = [], 0
        for name, shape in self.shapes.items():
            start, end = max(offset, low), min(offset + math.prod(shape), high)
            if start < end:
                pieces.append(Piece(name, shape, start - offset, start - low, end - start))
            offset += math.prod(shape)
        padding = torch.full((low % 3,), 7.0)
        return Shard(nn.Parameter(torch.cat((flat[low:high], padding))), tuple(pieces))

    def step(self, grads: dict[str, torch.Tensor], plan: StepPlan) -> torch.Tensor:
        """One step as the loop does it; returns the preserve term's value."""
        sums = 0
        for optimizer, own in self.ranks:
            pieces = [self._set_grads(shard, grads) for shard in own]
            sums = sums + optimizer.measure(pieces, plan)
        for optimizer, own in self.ranks:
            optimizer.prepare(plan, sums[:-1])
            for shard in own:  # DeepSpeed steps one partition at a time
                optimizer.param_groups[0]["params"] = [shard.weights]
                optimizer.step()
        return sums[-1]

    def _set_grads(self, shard: Shard, grads: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        shard.weights.grad = torch.zeros_like(shard.weights)
        views = []
        for piece in shard.pieces:
            view = shard.weights.grad[piece.flat_start : piece.flat_start + piece.numel]
            view.copy_(grads[piece.name].flatten()[piece.param_start : piece.param_start + piece.numel])
            views.append(view)
        return views

    def whole(self) -> dict[str, torch.Tensor]:
        """The parameters, put together again; padding must be as it was."""
        found = {name: torch.empty(math.prod(shape)) for name, shape in self.shapes.items()}
        for shard in self.shards:
            for piece in shard.pieces:
                run = shard.flat()[piece.flat_start : piece.flat_start + piece.numel]
                found[piece.name][piece.param_start : piece.param_start + piece.numel] = run
            used = sum(piece.numel for piece in shard.pieces)
            assert bool((shard.flat()[used:] == 7.0).all())
        return {name: found[name].view(shape) for name, shape in self.shapes.items()}


class Apart:
    """The oracle: each unit has parameters and an AdamW of its own, and is not stepped where not reached."""

    def __init__(self, scenario: Scenario, start: dict[str, torch.Tensor], adam: AdamSettings) -> None:
        banks = [name for name in start if ".bank." in name]
        self.units = [
            {name: nn.Parameter(start[name][e].clone()) for name in banks}
            for e in range(scenario.num_experts)
        ]
        self.units.append({n: nn.Parameter(t.clone()) for n, t in start.items() if n not in banks})
        self.origin = [{n: p.detach().clone() for n, p in unit.items()} for unit in self.units]
        self.adam = adam
        options = {"betas": adam.betas, "eps": adam.eps, "weight_decay": adam.weight_decay}
        self.optimizers = [torch.optim.AdamW(unit.values(), lr=1.0, **options) for unit in self.units]

    def step(self, grads: dict[str, torch.Tensor], plan: StepPlan) -> torch.Tensor:
        """Preserve by autograd, then clip and step; returns the preserve term's value."""
        total = torch.zeros(())
        for index, unit in enumerate(self.units):
            if not plan.reached[index]:
                continue
            is_router = index == len(self.units) - 1
            loss = sum((grads[n] if is_router else grads[n][index]).mul(p).sum() for n, p in unit.items())
            if plan.preserve_beta is not None:
                squares = [(p - self.origin[index][n]).square().sum() for n, p in unit.items()]
                term = plan.preserve_beta[index] * torch.stack(squares).sum()
                loss, total = loss + term, total + term.detach()
            self.optimizers[index].zero_grad()
            loss.backward()
            if self.adam.clip is not None:
                nn.utils.clip_grad_norm_(unit.values(), self.adam.clip)
            rate = plan.router_learning_rate if is_router else plan.learning_rate
            self.optimizers[index].param_groups[0]["lr"] = rate
            self.optimizers[index].step()
        return total

    def whole(self) -> dict[str, torch.Tensor]:
        *experts, routers = self.units
        stacked = {name: torch.stack([unit[name].detach() for unit in experts]) for name in experts[0]}
        return stacked | {name: parameter.detach() for name, parameter in routers.items()}


def random_tensors(scenario: Scenario, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of(scenario.num_experts)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@settings(max_examples=60, deadline=None)
@given(scenarios())
def test_cut_anywhere_it_equals_an_adamw_for_each_expert_that_skips_its_idle_steps(
    scenario: Scenario,
) -> None:
    """Clipping, weight decay, preserve, a rate of its own for routers; partitions cut inside experts.

    A unit that is not reached has gradient zero, as it has in training.
    """
    adam = AdamSettings(eps=1e-6, weight_decay=scenario.weight_decay, clip=scenario.clip)
    start = random_tensors(scenario, scenario.seed)
    ours, theirs = Partitioned(scenario, start, adam), Apart(scenario, start, adam)
    beta_U = torch.tensor([scenario.beta] * scenario.num_experts + [0.0]) if scenario.beta else None
    before = start
    for step, flags in enumerate(scenario.reached):
        reached_U = torch.tensor(flags)
        grads = random_tensors(scenario, 5000 + 10 * scenario.seed + step)
        for name, grad in grads.items():
            grad *= reached_U[-1] if ".router." in name else reached_U[:-1, None, None]
        plan = StepPlan(0.1 / (step + 1), 0.03, reached_U, beta_U)
        torch.testing.assert_close(ours.step(grads, plan), theirs.step(grads, plan), rtol=1e-4, atol=1e-6)
        after, expected = ours.whole(), theirs.whole()
        for name, tensor in expected.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-5)
            idle_E = ~reached_U[:-1] if ".bank." in name else ~reached_U[-1:].expand(scenario.num_experts)
            assert torch.equal(after[name][idle_E], before[name][idle_E])
        before = after
    for optimizer, _ in ours.ranks:
        assert optimizer.steps.tolist() == torch.tensor(scenario.reached).sum(0).tolist()


@settings(max_examples=30, deadline=None)
@given(scenarios(), st.sets(st.integers(0, 3)))
def test_rows_of_routers_that_rest_keep_every_bit_and_the_others_train_as_if_alone(
    scenario: Scenario, chosen: set[int]
) -> None:
    """Against torch's AdamW and clipping on those rows as parameters of their own, cut anywhere; no gradient
    of a resting row counts in the norm, and neither moments nor decay move it."""
    rows = sorted(chosen & set(range(scenario.num_experts)))
    adam = AdamSettings(
        eps=1e-6, weight_decay=scenario.weight_decay, clip=scenario.clip, router_rows=tuple(rows)
    )
    start, name = random_tensors(scenario, scenario.seed), "q.router.weight"
    ours = Partitioned(scenario, start, adam)
    alone = nn.Parameter(start[name][rows].clone())
    theirs = torch.optim.AdamW([alone], lr=0.03, eps=1e-6, weight_decay=scenario.weight_decay)
    resting = [e for e in range(scenario.num_experts) if e not in rows]
    reached_U = torch.tensor([False] * scenario.num_experts + [True])
    for step in range(NUM_STEPS):
        grads = random_tensors(scenario, 5000 + 10 * scenario.seed + step)
        ours.step(grads, StepPlan(0.1, 0.03, reached_U))
        alone.grad = grads[name][rows].clone()
        if scenario.clip is not None and rows:
            nn.utils.clip_grad_norm_([alone], scenario.clip)
        theirs.step()
        after = ours.whole()
        torch.testing.assert_close(after[name][rows], alone.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(after[name][resting], start[name][resting])
        assert all(torch.equal(after[other], start[other]) for other in start if other != name)
    for optimizer, shards in ours.ranks:
        for index, shard in enumerate(shards):
            for kind in KINDS:
                moments = optimizer.moments.flat(kind, index)
                assert not moments[_resting(shard, name, resting)].any()


def _resting(shard: Shard, name: str, experts: list[int]) -> list[int]:
    """Elements of a shard that belong to these experts' rows of the router."""
    return [
        piece.flat_start + i
        for piece in shard.pieces
        if piece.name == name
        for i in range(piece.numel)
        if (piece.param_start + i) // piece.shape[1] in experts
    ]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 40), st.integers(1, 40))
def test_spans_name_the_expert_of_every_element_of_a_piece(
    num_experts: int, width: int, param_start: int, numel: int
) -> None:
    """Against counting element by element."""
    total = num_experts * width
    param_start = param_start % total
    numel = min(numel, total - param_start)
    piece = Piece("q.bank.lora_A", (num_experts, 1, width), param_start, 11, numel)
    found = [
        (span.start + row * span.width + column, span.units[0] + row)
        for span in spans_of(piece, everything_here(num_experts))
        for row in range(span.count)
        for column in range(span.width)
    ]
    assert found == [(11 + i, (param_start + i) // width) for i in range(numel)]
