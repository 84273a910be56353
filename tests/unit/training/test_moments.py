"""Adam's moments in 8 bits: the number format, and what an optimizer does that keeps them so."""

from __future__ import annotations

import itertools

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim import AdamW8bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsmixer.placement.layout import everything_here
from dsmixer.placement.pieces import Piece, Shard
from dsmixer.training.moments import BLOCK, KINDS, Keep, Moments
from dsmixer.training.optimizer import AdamSettings, ExpertAdamW, StepPlan
from dsmixer.training.rows import spans_of, stacked

EIGHT_BIT = Keep("8bit")
RATE = 1e-2


def one_stack(num_experts: int, width: int, keep: Keep = EIGHT_BIT) -> tuple[Moments, Shard]:
    """The moments of one bank ``[E, 1, width]`` in one shard."""
    numel = num_experts * width
    piece = Piece("q.bank.lora_A", (num_experts, 1, width), 0, 0, numel)
    shard = Shard(nn.Parameter(torch.zeros(numel)), (piece,))
    stacks = stacked(spans_of(piece, everything_here(num_experts)))
    return Moments([shard], [stacks], keep, routers=num_experts), shard


def drawn(seed: int, numel: int, *, squares: bool) -> torch.Tensor:
    """Numbers of very different sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(
        -12, 3, (numel,), generator=generator
    )
    values[torch.rand(numel, generator=generator) < 0.1] = 0.0
    return values.square() if squares else values


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3 * BLOCK), st.integers(0, 1000), st.sampled_from(KINDS))
def test_numbers_become_the_nearest_ones_of_their_block_and_then_stay(
    num_experts: int, width: int, seed: int, kind: str
) -> None:
    """Against a search through bitsandbytes' table in float64; a second rounding changes no bit."""
    moments, _ = one_stack(num_experts, width)
    values = drawn(seed, num_experts * width, squares=kind == "exp_avg_sq")
    moments.fill(kind, 0, values)
    kept = moments.flat(kind, 0)
    table = create_dynamic_map(signed=kind == "exp_avg").double().sort().values
    if kind == "exp_avg":
        table[0] = -1.0
    for row, kept_row in zip(values.view(num_experts, width), kept.view(num_experts, width), strict=True):
        for block, kept_block in zip(row.split(BLOCK), kept_row.split(BLOCK), strict=True):
            size = block.abs().max().double()
            assert kept_block.abs().max() == block.abs().max(), "the largest number is kept as it is"
            best = (block.double()[:, None] - size * table).abs().amin(1)
            error = (block.double() - kept_block.double()).abs()
            assert bool((error <= best + 1e-6 * size).all())
    again, _ = one_stack(num_experts, width)
    again.fill(kind, 0, kept)
    assert again.flat(kind, 0).equal(kept)


class Trained:
    """Experts ``[E, 2, width]`` trained on gradients of their own by an optimizer of ours."""

    def __init__(self, start: torch.Tensor, keep: Keep, experts: list[int] | None = None) -> None:
        num_experts = start.shape[0]
        piece = Piece("q.bank.lora_A", tuple(start.shape), 0, 0, start.numel())
        self.shard = Shard(nn.Parameter(start.flatten().clone()), (piece,))
        self.optimizer = ExpertAdamW(
            [self.shard.weights], everything_here(num_experts), AdamSettings(keep=keep)
        )
        self.optimizer.bind([self.shard])
        self.shape = start.shape

    def step(self, grad: torch.Tensor, reached: list[bool]) -> None:
        plan = StepPlan(RATE, RATE, torch.tensor([*reached, False]))
        self.shard.weights.grad = (grad * torch.tensor(reached)[:, None, None]).flatten()
        pieces = [[self.shard.weights.grad]]
        self.optimizer.prepare(plan, self.optimizer.measure(pieces, plan)[:-1])
        self.optimizer.step()

    @property
    def weights(self) -> torch.Tensor:
        return self.shard.flat().view(self.shape).clone()


def gradients(num_experts: int, width: int, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [0.01 * torch.randn(num_experts, 2, width, generator=generator) for _ in range(steps)]


def test_an_expert_moves_as_under_the_8_bit_adamw_of_bitsandbytes() -> None:
    """Not the same bits, for it rounds the smallest numbers more coarsely: held to float32 beside it."""
    width, steps = 4096, 20
    start = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(1))
    ours, exact = Trained(start, EIGHT_BIT), Trained(start, Keep())
    theirs = nn.Parameter(start.flatten().clone())
    adam = AdamW8bit([theirs], lr=RATE, weight_decay=0.0)
    for grad in gradients(1, width, steps):
        ours.step(grad, [True])
        exact.step(grad, [True])
        clip = min(1.0, 1.0 / (float(grad.norm()) + 1e-6))
        theirs.grad = grad.flatten() * clip
        adam.step()
    moved = (exact.weights - start).norm()
    ours_off = (ours.weights - exact.weights).norm() / moved
    theirs_off = (theirs.detach().view_as(start) - exact.weights).norm() / moved
    apart = (ours.weights.flatten() - theirs.detach()).norm() / moved
    print(f"8-bit AdamW, {steps} steps: {ours_off:.4f} of the distance moved from float32", end="; ")
    print(f"bitsandbytes': {theirs_off:.4f}; from each other {apart:.4f}")
    assert 0 < ours_off < 1.1 * theirs_off < 0.1
    assert apart < 0.05


@pytest.mark.parametrize("width", [4, 300])
def test_experts_train_together_as_each_alone_and_one_not_reached_stays_bit_for_bit(width: int) -> None:
    num_experts, steps = 3, 6
    start = torch.randn(num_experts, 2, width, generator=torch.Generator().manual_seed(2))
    together = Trained(start, EIGHT_BIT)
    alone = [Trained(start[e : e + 1], EIGHT_BIT) for e in range(num_experts)]
    for number, grad in enumerate(gradients(num_experts, width, steps)):
        reached = [number % 2 == 0, True, number < 2]
        before = together.weights, [together.optimizer.moments.flat(kind, 0) for kind in KINDS]
        together.step(grad, reached)
        after = together.weights, [together.optimizer.moments.flat(kind, 0) for kind in KINDS]
        for e in range(num_experts):
            if reached[e]:
                alone[e].step(grad[e : e + 1], [True])
                continue
            assert before[0][e].equal(after[0][e])
            for was, now in zip(before[1], after[1], strict=True):
                assert was.view(num_experts, -1)[e].equal(now.view(num_experts, -1)[e])
    for e in range(num_experts):
        assert together.weights[e : e + 1].equal(alone[e].weights)


def test_what_is_read_from_a_checkpoint_goes_on_bit_for_bit() -> None:
    start = torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(3))
    whole, grads = Trained(start, EIGHT_BIT), gradients(2, 300, 8)
    for grad in grads[:4]:
        whole.step(grad, [True, True])
    resumed = Trained(whole.weights, EIGHT_BIT)
    resumed.optimizer.steps.copy_(whole.optimizer.steps)
    for kind in KINDS:
        resumed.optimizer.moments.fill(kind, 0, whole.optimizer.moments.flat(kind, 0))
    for grad in grads[4:]:
        whole.step(grad, [True, True])
        resumed.step(grad, [True, True])
    assert resumed.weights.equal(whole.weights)


def cut_at(cuts: list[int], width: int, num_experts: int) -> list[Moments]:
    """One bank cut into the partitions of several ranks."""
    found, bounds = [], [0, *cuts, num_experts * width]
    for begin, end in itertools.pairwise(bounds):
        piece = Piece("q.bank.lora_A", (num_experts, 1, width), begin, 0, end - begin)
        shard = Shard(nn.Parameter(torch.zeros(end - begin)), (piece,))
        stacks = stacked(spans_of(piece, everything_here(num_experts)))
        found.append(Moments([shard], [stacks], EIGHT_BIT, routers=num_experts))
    return found


def filled(ranks: list[Moments], kind: str, values: torch.Tensor) -> torch.Tensor:
    """The values as the ranks keep them, read in parts as a save does."""
    found, begin = [], 0
    for moments in ranks:
        part = moments.part(kind, 0)
        moments.fill(kind, 0, values[begin : begin + part.numel()])
        assert part.read().equal(moments.flat(kind, 0))
        found += [part[i : i + 100].read() for i in range(0, part.numel(), 100)]
        begin += part.numel()
    return torch.cat(found)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4 * BLOCK),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.integers(0, 1000),
    st.sampled_from(KINDS),
)
def test_another_layout_keeps_all_blocks_but_those_that_a_cut_goes_through(
    num_experts: int, width: int, shares: tuple[float, float], seed: int, kind: str
) -> None:
    """Saved by two ranks, read by two with another cut, and by one."""
    numel = num_experts * width
    cuts = sorted({min(max(int(share * numel), 1), numel - 1) for share in shares} if numel > 1 else set())
    values = drawn(seed, numel, squares=kind == "exp_avg_sq")
    saved = filled(cut_at(cuts[:1], width, num_experts), kind, values)
    for others in (cuts[1:], []):
        kept = filled(cut_at(others, width, num_experts), kind, saved)
        changed = (kept != saved).nonzero().flatten().tolist()
        cut_blocks = {(cut // width, cut % width // BLOCK) for cut in (*cuts[:1], *others)}
        assert {(place // width, place % width // BLOCK) for place in changed} <= cut_blocks
        assert bool(((kept - saved).abs() <= saved.abs().max() * 0.02 + 1e-30).all())


def test_moments_of_experts_take_a_quarter_and_routers_stay_in_float32() -> None:
    """1 byte and 4 / 256 for the scale a number, beside 4."""
    width = 4 * BLOCK
    moments, _ = one_stack(4, width)
    assert moments.num_bytes() == 2 * 4 * (width + 4 * width // BLOCK)
    router = Piece("q.router.weight", (4, width), 0, 0, 4 * width)
    shard = Shard(nn.Parameter(torch.zeros(4 * width)), (router,))
    kept = Moments([shard], [stacked(spans_of(router, everything_here(4)))], EIGHT_BIT, routers=4)
    values = drawn(0, 4 * width, squares=False)
    kept.fill("exp_avg", 0, values)
    assert kept.flat("exp_avg", 0).equal(values)
