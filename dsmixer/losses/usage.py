"""Means over tokens that balance losses are made of: of the micro-batch, and of the step before.

Shapes: M routers, T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch

from dsmixer.losses.interface import Usage, UsageFrom
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics

FLOOR = 1e-6
"""Least mean whose logarithm or inverse is taken: an expert beneath it is pushed as hard as at it."""


def usage_weights(output: RouterOutput, kind: str, temperature: float) -> torch.Tensor:
    """What each token adds to the usage, ``[T, E]``; of ``topk``, ``smooth`` and ``mean_p`` with its graph.

    ``topk`` is made from p where a weight was chosen, so that modes whose choice is detached have it too.
    """
    p_TE, indices_TK = output.p_TE, output.choice.indices_TK
    if kind == "mean_p":
        return p_TE
    if kind == "topk":
        kept_TK = p_TE.gather(1, indices_TK) * (output.choice.weights_TK.detach() > 0)
        shares_TK = kept_TK / kept_TK.sum(1, keepdim=True)
        return torch.zeros_like(p_TE).scatter(1, indices_TK, shares_TK)
    if kind == "top1":
        return torch.zeros_like(p_TE).scatter(1, p_TE.detach().argmax(1, keepdim=True), 1.0)
    if kind == "chosen":
        gate_TE = output.choice.gate_TE
        if gate_TE is not None:
            return (gate_TE.detach() > 0).to(p_TE.dtype)
        return torch.zeros_like(p_TE).scatter(1, indices_TK, 1.0)
    return torch.softmax(output.logits_TE / temperature, dim=1)


def num_tokens(output: RouterOutput) -> torch.Tensor:
    """Real tokens of the micro-batch, a scalar in the dtype of p."""
    return output.token_sum(torch.ones_like(output.p_TE[:, 0]))


@torch.no_grad()
def micro_batch_usage(output: RouterOutput, kind: str, temperature: float = 1.0) -> torch.Tensor:
    """Usage ``[E]`` of one micro-batch, a mean over its real tokens (0 where no token is real)."""
    sums_E = output.token_sum(usage_weights(output, kind, temperature))
    return sums_E / num_tokens(output).clamp_min(1)


def usage_at(
    output: RouterOutput, previous_usage_E: torch.Tensor, usage_from: UsageFrom, kind: str, temperature: float
) -> torch.Tensor:
    """The constant usage ``[E]`` that a loss is taken at, in the dtype of p."""
    if usage_from == "micro_batch":
        return micro_batch_usage(output, kind, temperature)
    return previous_usage_E.detach().to(output.p_TE.dtype)


def tangent(
    output: RouterOutput,
    values_TE: torch.Tensor,
    mean_E: torch.Tensor,
    value: torch.Tensor,
    slope_E: torch.Tensor,
) -> torch.Tensor:
    """``sum_x F(m) + grad F(m) (u(x) - m)`` over real tokens: a function of a mean, linear in tokens.

    Args:
        output: whose tokens are real.
        values_TE: ``u(x)``, whose mean F is of.
        mean_E: m, a constant.
        value: ``F(m)``; may have the graph of a learned parameter.
        slope_E: ``grad F(m)``, a constant.
    """
    count = num_tokens(output)
    moved_E = output.token_sum(values_TE) - count * mean_E
    return count * value + moved_E @ slope_E.detach()


def previous_usage(statistics: RoutingStatistics, kind: Usage, *, pooled: bool = False) -> torch.Tensor:
    """Usage ``[M, E]`` of a step from its reduced statistics; 1/E for a router that saw no token.

    Args:
        statistics: of the whole step, all ranks.
        kind: which usage; ``smooth`` with the temperature that the statistics were made with.
        pooled: whether each row is the mean over all routers.
    """
    if kind in ("topk", "top1", "smooth"):
        usage_ME = statistics.usage(kind)
    else:
        sums_ME = statistics.p_ME if kind == "mean_p" else statistics.chosen_ME
        tokens_M1 = statistics.tokens_M[:, None]
        even = torch.full_like(sums_ME, 1.0 / statistics.num_experts)
        usage_ME = torch.where(tokens_M1 > 0, sums_ME / tokens_M1.clamp_min(1), even)
    return usage_ME.mean(0, keepdim=True).expand_as(usage_ME) if pooled else usage_ME
