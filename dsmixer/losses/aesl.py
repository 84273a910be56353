"""The two losses that "Advancing Expert Specialization for Better MoE" (AESL, arXiv 2505.22323) adds to
Switch's: outputs of a token's experts orthogonal to each other, and scores that vary.

The paper and its released code differ in both; ``form`` and ``over`` choose, and default to the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from dsmixer.losses.interface import NOTHING, Extras, PlainLoss, UsageFrom
from dsmixer.losses.usage import tangent, usage_at
from dsmixer.routing.statistics import RouterOutput


@dataclass(frozen=True)
class AeslOrthogonalityLoss(PlainLoss):
    """AESL's L_o: how much of a chosen expert's output lies along the other chosen experts' outputs.

        paper: L = weight * mean_x sum_j sum_{k != j} || <o_j, o_k> / (<o_k, o_k> + epsilon) * o_k ||^2
        code:  L = weight * mean_x (1/K) sum_j || projection of o_j on the span of the others ||^2

    ``o_j(x) = s_j B_j A_j x`` is what the chosen expert j puts out, before its weight (the paper: the output
    where the expert's score is above 0, and 0 elsewhere). So L_o depends on a router's logits through the
    choice alone, and its gradient goes to the experts and to what made x: where experts train, to A and B of
    this mixer and of those before; where they are frozen, to the routers before alone; never to the router
    that chose. That is the division of labour that the paper argues for: L_o moves experts, L_v routers.

    0 where the outputs are orthogonal, and where K = 1. The paper sums over tokens; here it is a mean over
    real tokens and mixers, so that the weight does not depend on the batch. The code's Gram-Schmidt is
    written here as ``G_jj - 1 / (G^-1)_jj`` of the Gram matrix G with a ridge, the same where the others are
    independent.

    One number a token: exact under accumulation and on any number of ranks. In a run the mixers make the
    outputs apart, some tokens at a time, and again in the backward pass (``experts.apart``): that costs the
    products with A and B once more each way, and no more than ``BLOCK_ELEMENTS`` outputs are alive. All
    experts of a token have to be on its rank, and their weights whole: placement ``replicate``.

    Attributes:
        weight: ours, 1e-3. The released code sets it once so that the term starts near 1e-3.
        form: ``paper`` pairs, ``code`` spans.
        epsilon: keeps the division finite; in ``code`` relative to the mean squared output.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"outputs_TKO"})

    weight: float = 1e-3
    form: Literal["paper", "code"] = "paper"
    epsilon: float = 1e-6

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        assert extras.outputs_TKO is not None, "orthogonality without the experts' outputs"
        chosen_TK = output.choice.weights_TK.detach() > 0
        along_T = self.per_token(extras.outputs_TKO.to(output.p_TE.dtype), chosen_TK)
        return ramp * self.weight * output.token_sum(along_T)

    def per_token(self, outputs_TKO: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """The loss of each token before its weight, ``[T]``; outputs that are not chosen do not enter."""
        kept_TKO = torch.where(chosen_TK[..., None], outputs_TKO, 0.0)
        gram_TKK = kept_TKO @ kept_TKO.transpose(1, 2)
        return self._pairs(gram_TKK) if self.form == "paper" else self._spans(gram_TKK, chosen_TK)

    def _pairs(self, gram_TKK: torch.Tensor) -> torch.Tensor:
        squared_T1K = gram_TKK.diagonal(dim1=1, dim2=2)[:, None]
        along_TKK = (gram_TKK / (squared_T1K + self.epsilon)).square() * squared_T1K
        others_KK = 1 - torch.eye(gram_TKK.shape[1], dtype=gram_TKK.dtype, device=gram_TKK.device)
        return (along_TKK * others_KK).sum((1, 2))

    def _spans(self, gram_TKK: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        # the inverse of nearly parallel outputs is beyond float32
        wide_TKK = gram_TKK.double()
        squared_TK = wide_TKK.diagonal(dim1=1, dim2=2)
        # experts start at B = 0: a ridge of their own keeps outputs that are all zero invertible
        ridge_T = self.epsilon * squared_TK.detach().mean(1) + 1e-12
        eye_KK = torch.eye(gram_TKK.shape[1], dtype=wide_TKK.dtype, device=gram_TKK.device)
        ridged_TKK = wide_TKK + ridge_T[:, None, None] * eye_KK
        apart_TK = 1 / torch.linalg.inv(ridged_TKK).diagonal(dim1=1, dim2=2)
        along_TK = ridged_TKK.diagonal(dim1=1, dim2=2) - apart_TK
        return (along_TK.sum(1) / chosen_TK.sum(1).clamp_min(1)).to(gram_TKK.dtype)


@dataclass(frozen=True)
class AeslVarianceLoss(PlainLoss):
    """AESL's L_v: minus the variance of the routing scores.

        tokens:  L = -weight * sum_j mean_x (p_j(x) - mean_x p_j)^2           (the paper)
        experts: L = -weight * mean_x (1/E) sum_j (p_j(x) - 1/E)^2            (the released code)

    Scores are the router's probabilities of all experts, chosen or not; the paper leaves that open.
    0 is the largest value: for ``tokens`` where all tokens are alike, for ``experts`` where each is uniform.

    ``experts`` is one number a token. ``tokens`` is ``-E|p|^2 + |p_mean|^2``, the second at its tangent in m:
    together ``-sum_j (p_j(x) - m_j)^2``, the variance around the mean of the step before.

    Attributes:
        weight: ours, 1e-4. The released code sets it once so that the term starts near 1e-4.
        over: what the variance is over.
        usage_from: where m is from; the paper takes the micro-batch.
    """

    weight: float = 1e-4
    over: Literal["tokens", "experts"] = "tokens"
    usage_from: UsageFrom = "previous_step"

    def __call__(
        self, output: RouterOutput, previous_usage_E: torch.Tensor, ramp: float, extras: Extras = NOTHING
    ) -> torch.Tensor:
        """``ramp`` times the loss summed over real tokens; arguments as ``RoutingLoss``."""
        p_TE = output.p_TE
        if self.over == "experts":
            return -ramp * self.weight * output.token_sum(p_TE.var(1, correction=0))
        m_E = usage_at(output, previous_usage_E, self.usage_from, self.usage, self.smooth_temperature)
        of_mean = tangent(output, p_TE, m_E, m_E.square().sum(), 2 * m_E)
        return ramp * self.weight * (of_mean - output.token_sum(p_TE.square().sum(1)))
