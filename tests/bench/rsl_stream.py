"""What the routing losses make of a router, on a constructed stream of tokens.

    python tests/bench/rsl_stream.py [--steps 3000] [--seeds 5] [--logit-std 1.0]

The stream: C clusters of D-dimensional token vectors, ``x = common * u + center_c + noise`` with one
direction u for all, without labels. A linear router ``G [E, D]`` is trained by AdamW on the routing loss
alone, without a task, so that what is seen is the loss and nothing else. The first table has centred
tokens (common = 0); the second has a common direction as long as the centres (common = 1), as hidden
states often have, which makes the first router send most tokens to few experts.

The columns: entropy is the mean of H(p(x)), at most ln E; load variance is the variance over experts of
E f, f the top-1 frequency (0: even; E - 1: all on one expert); largest f and the largest mean p (1/E: even);
purity is the share of a cluster's tokens that go to that cluster's most frequent expert.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsmixer.losses.balance import RoutingLoss, SwitchLoss
from dsmixer.losses.rsl import RoutingSpecializationLoss, ramp_at
from dsmixer.routing.modes import Routing, topk
from dsmixer.routing.router import Router
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics

ALPHA, ENTROPY_WEIGHT = 0.1, 0.05  # design §1, the paper's A.8

# the auxiliary loss at RSL's own weight: alpha of eq. 3 stands without the factor E
LOSSES: dict[str, Callable[[int], RoutingLoss | None]] = {
    "none (the start)": lambda num_experts: None,
    "switch": lambda num_experts: SwitchLoss(alpha=ALPHA / num_experts),
    "specialize": lambda num_experts: RoutingSpecializationLoss(ALPHA, ENTROPY_WEIGHT),
    "specialize, lambda .02": lambda num_experts: RoutingSpecializationLoss(ALPHA, 0.02),
    "specialize, lambda .01": lambda num_experts: RoutingSpecializationLoss(ALPHA, 0.01),
    "paper_eq5": lambda num_experts: RoutingSpecializationLoss(ALPHA, ENTROPY_WEIGHT, "paper_eq5"),
    "entropy alone": lambda num_experts: RoutingSpecializationLoss(0.0, ENTROPY_WEIGHT),
}


@dataclass(frozen=True)
class Stream:
    """Clusters of token vectors.

    Attributes:
        centers_CD: the common part included.
        noise: standard deviation around a centre.
    """

    centers_CD: torch.Tensor
    noise: float

    @classmethod
    def build(cls, num_clusters: int, width: int, common: float, generator: torch.Generator) -> Stream:
        """Random directions of length sqrt(D), and a common one of ``common`` times that length."""
        centers_CD = torch.nn.functional.normalize(
            torch.randn(num_clusters, width, generator=generator), dim=1
        )
        common_D = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        return cls(math.sqrt(width) * (centers_CD + common * common_D), 0.3)

    def draw(self, num_tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``[T, D]`` and the clusters they come from, ``[T]``."""
        clusters_T = torch.randint(self.centers_CD.shape[0], (num_tokens,), generator=generator)
        noise_TD = torch.randn(num_tokens, self.centers_CD.shape[1], generator=generator)
        return self.centers_CD[clusters_T] + self.noise * noise_TD, clusters_T


@dataclass(frozen=True)
class Outcome:
    """What a trained router does with fresh tokens; the columns are told at the top of the file."""

    entropy: float
    load_variance: float
    largest_load: float
    largest_mean_p: float
    purity: float


def route(router: Router, x_TD: torch.Tensor) -> RouterOutput:
    """The router's work on a micro-batch, as a mixer does it."""
    logits_TE = router(x_TD)
    p_TE = torch.softmax(logits_TE, dim=1)
    top_k = min(3, p_TE.shape[1])
    return RouterOutput(logits_TE, p_TE, topk(p_TE, Routing(top_k=top_k)), None)


@torch.no_grad()
def measure(router: Router, stream: Stream, generator: torch.Generator) -> Outcome:
    """Route 4,096 fresh tokens and look at the result."""
    x_TD, clusters_T = stream.draw(4096, generator)
    output = route(router, x_TD)
    num_experts = output.p_TE.shape[1]
    first_T = output.p_TE.argmax(1)
    load_E = torch.bincount(first_T, minlength=num_experts) / len(first_T)
    counts_CE = torch.zeros(stream.centers_CD.shape[0], num_experts)
    counts_CE.index_put_((clusters_T, first_T), torch.ones(len(first_T)), accumulate=True)
    return Outcome(
        entropy=output.entropy_T().mean().item(),
        load_variance=(num_experts * load_E).var(correction=0).item(),
        largest_load=load_E.max().item(),
        largest_mean_p=output.p_TE.mean(0).max().item(),
        purity=(counts_CE.max(1).values.sum() / counts_CE.sum()).item(),
    )


def train_router(
    loss: RoutingLoss | None,
    *,
    num_experts: int = 6,
    num_clusters: int = 24,
    width: int = 32,
    steps: int = 600,
    tokens: int = 256,
    learning_rate: float = 2e-3,
    logit_std: float = 0.1,
    common: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """Train a router on the stream with ``loss`` alone; None measures the start.

    Args:
        loss: the routing loss.
        num_experts: E.
        num_clusters: C.
        width: D.
        steps: optimizer steps; alpha and lambda rise over the first 30 %.
        tokens: T of a step.
        learning_rate: of AdamW, constant.
        logit_std: standard deviation of the first logits, about.
        common: length of the common direction, in lengths of a centre.
        seed: of centres, tokens and start.
    """
    generator = torch.Generator().manual_seed(seed)
    stream = Stream.build(num_clusters, width, common, generator)
    router = Router(num_experts, width)
    length = stream.centers_CD.norm(dim=1).mean().item()
    with torch.no_grad():
        router.weight.copy_(torch.randn(num_experts, width, generator=generator) * logit_std / length)
    optimizer = torch.optim.AdamW(router.parameters(), lr=learning_rate, weight_decay=0.0)
    usage_E = torch.full((num_experts,), 1.0 / num_experts)
    for step in range(steps if loss is not None else 0):
        assert loss is not None
        output = route(router, stream.draw(tokens, generator)[0])
        statistics = RoutingStatistics(1, num_experts, smooth_temperature=loss.smooth_temperature)
        statistics.record(0, output, None)
        optimizer.zero_grad()
        (loss(output, usage_E, ramp_at(step, steps, 0.3)) / tokens).backward()
        optimizer.step()
        usage_E = statistics.usage(loss.usage)[0]
    return measure(router, stream, torch.Generator().manual_seed(seed + 1))


def print_table(common: float, args: argparse.Namespace) -> None:
    """One row a loss, means over the seeds."""
    print(f"\ncommon direction {common:g}")
    print("loss                    entropy, nats   bits  load variance  largest f  largest mean p  purity")
    for name, make in LOSSES.items():
        outcomes = [
            train_router(
                make(args.experts),
                num_experts=args.experts,
                num_clusters=args.clusters,
                steps=args.steps,
                common=common,
                logit_std=args.logit_std,
                seed=seed,
            )
            for seed in range(args.seeds)
        ]
        mean = {key: sum(getattr(o, key) for o in outcomes) / len(outcomes) for key in vars(outcomes[0])}
        print(
            f"{name:23s} {mean['entropy']:13.3f} {mean['entropy'] / math.log(2):6.3f} "
            f"{mean['load_variance']:14.3f} {mean['largest_load']:10.3f} {mean['largest_mean_p']:15.3f} "
            f"{mean['purity']:7.3f}"
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--clusters", type=int, default=24)
    parser.add_argument("--experts", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--logit-std", type=float, default=0.1, help="of the router's start")
    args = parser.parse_args()
    top = math.log(args.experts)
    print(f"E={args.experts} C={args.clusters} steps={args.steps} seeds={args.seeds}: ln E = {top:.3f} nats")
    for common in (0.0, 1.0):
        print_table(common, args)


if __name__ == "__main__":
    main()
