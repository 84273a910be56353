"""Which compute form is fastest where: forward and backward of one bank, by form, in turns.

    python -m tests.bench.forms                               # on the CPU
    python -m tests.bench.forms --device cuda --dtypes bfloat16 --widths 4096 --tokens 1024 4096

Every line is a pool, a number of tokens and how the experts are loaded: ``even`` draws them uniformly,
``skewed`` with probabilities that fall as 1/rank, ``one`` gives stretches of tokens one expert each, as hard
routing does. The last two columns are the fastest form and the one that ``auto`` takes, with its time over
the fastest.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.choice import choose_form
from dsmixer.experts.forms import Form, forms
from dsmixer.training.heap import keep_freed_memory

NAMES = ("dense", "grouped", "blocked", "fused", "pairs")


@dataclass(frozen=True)
class Point:
    """E experts of rank R, K a token, T tokens, width D in and out."""

    dtype: torch.dtype
    width: int
    tokens: int
    experts: int
    rank: int
    top_k: int
    load: str
    device: str

    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{dtype:8} D={self.width:<5} T={self.tokens:<5} E={self.experts:<4} r={self.rank:<3} "
            f"K={self.top_k} {self.load:6}"
        )

    def assignment(self) -> Assignment:
        rng = torch.Generator().manual_seed(0)
        if self.load == "one":
            indices_TK = (torch.arange(self.tokens) * min(4, self.experts) // self.tokens)[:, None]
        else:
            odds_E = torch.ones(self.experts)
            if self.load == "skewed":
                odds_E /= torch.arange(1, self.experts + 1)
            indices_TK = torch.multinomial(odds_E.expand(self.tokens, -1), self.top_k, generator=rng)
        weights_TK = torch.full(indices_TK.shape, 1.0 / self.top_k, device=self.device)
        weights_TK.requires_grad_(self.load != "one")
        return Assignment(self.experts, indices_TK=indices_TK.to(self.device), weights_TK=weights_TK)


def main() -> None:
    """Measure and print a line a point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--pools", nargs="+", default=["6x64", "16x64", "64x16", "64x64", "196x16"])
    parser.add_argument("--loads", nargs="+", default=["even", "skewed", "one"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()  # as a run does
    print(f"{'':54}" + "".join(f"{name:>10}" for name in NAMES) + "   ms, forward and backward")
    for dtype, width, tokens, pool, load in itertools.product(
        args.dtypes, args.widths, args.tokens, args.pools, args.loads
    ):
        experts, rank = map(int, pool.split("x"))
        top_k = 1 if load == "one" else 3
        point = Point(getattr(torch, dtype), width, tokens, experts, rank, top_k, load, args.device)
        found = measure(point, args.rounds)
        best, auto = min(found, key=lambda name: found[name]), chosen(point)
        times = "".join(f"{of:10.2f}" for of in found.values())
        print(f"{point.title()}{times}   {best:8} {auto:8} {found[auto] / found[best]:5.2f}", flush=True)


def chosen(point: Point) -> str:
    x_TD = torch.empty(point.tokens, point.width, dtype=point.dtype, device=point.device)
    return choose_form(x_TD, point.rank, point.assignment())


def measure(point: Point, rounds: int) -> dict[str, float]:
    """Median milliseconds of each form."""
    rng = torch.Generator(device=point.device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, device=point.device).to(dtype)

    x_TD, incoming_TO = (draw(point.tokens, point.width, dtype=point.dtype) for _ in range(2))
    banks = [draw(point.experts, point.rank, point.width).requires_grad_() for _ in range(2)]
    s_E, assignment = torch.ones(point.experts, device=point.device), point.assignment()
    x_TD.requires_grad_()

    def step(form: Form) -> None:
        y_TO = form(x_TD, *banks, s_E, assignment, None)
        y_TO.backward(incoming_TO)
        for leaf in (x_TD, *banks):
            leaf.grad = None

    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(rounds + 1):
        for name in times:
            seconds = timed(lambda name=name: step(forms[name]), point.device)  # type: ignore[misc]
            if turn:
                times[name].append(1e3 * seconds)
    return {name: statistics.median(of) for name, of in times.items()}


def timed(work: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
