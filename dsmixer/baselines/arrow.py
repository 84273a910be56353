"""Arrow: experts are their own routers.

Shapes: T tokens, D input width, O output width, E experts, R LoRA rank, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from dsmixer.adapters.peft_format import LoraPair
from dsmixer.baselines.adding import Delta, adding, wide
from dsmixer.baselines.interface import Fitted, Given
from dsmixer.baselines.merged import pairs_of
from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank


@dataclass(frozen=True)
class Arrow:
    """Arrow (arXiv 2405.11157): ``score_e(x) = abs(x . v_e)``.

    v_e is the top right singular vector of ``B_e A_e``. The K largest scores, divided by the temperature,
    go through a softmax. Nothing is trained.

    Attributes:
        top_k: K, PEFT's 3; at most E.
        temperature: PEFT's 1.
    """

    trains: ClassVar[bool] = False

    top_k: int = 3
    temperature: float = 1.0

    def __call__(self, given: Given) -> Fitted:
        """Prototypes from the weights alone; arguments as ``Method``.

        ``found``: ``leading_share`` by expert, the share of ``|B A|^2`` that lies along its prototype, mean
        over projections: 1 where one direction says all.
        """
        mixture = given.mixture
        deltas: dict[str, Delta] = {}
        shares: list[torch.Tensor] = []
        for path, mixer in mixture.mixers.items():
            found = [prototype(pair) for pair in pairs_of(mixture, path)]
            v_ED = torch.stack([v_D for v_D, _ in found])
            shares.append(torch.tensor([share for _, share in found]))
            deltas[path] = self._delta(mixer.bank, v_ED)
        leading: dict[str, Any] = dict(
            zip(mixture.expert_names, torch.stack(shares).mean(0).tolist(), strict=True)
        )
        return Fitted(lambda _: adding(mixture.model, deltas), found={"leading_share": leading})

    def _delta(self, bank: ExpertBank, v_ED: torch.Tensor) -> Delta:
        def delta(x_TD: torch.Tensor) -> torch.Tensor:
            scores_TE = (wide(x_TD) @ v_ED.T.to(wide(x_TD).dtype)).abs()
            return bank(x_TD, top_softmax(scores_TE / self.temperature, self.top_k))

        return delta


def top_softmax(scores_TE: torch.Tensor, top_k: int) -> Assignment:
    """The K experts of the largest scores, with the softmax over those scores as weights."""
    num_experts = scores_TE.shape[1]
    top_TK, indices_TK = scores_TE.topk(min(top_k, num_experts), dim=1)
    return Assignment(num_experts, indices_TK=indices_TK, weights_TK=F.softmax(top_TK, dim=1))


@torch.no_grad()
def prototype(pair: LoraPair) -> tuple[torch.Tensor, float]:
    """The top right singular vector of ``B A``, ``[D]``, and its share of the squared norm.

    Both 0 where the expert adds nothing. ``B A`` is not made: with ``A^T = Q S`` the right singular vectors
    are Q times those of ``B S^T``, a matrix R wide.
    """
    q_DR, s_RR = torch.linalg.qr(pair.a_RD.float().T)
    _, sizes_R, vt_RR = torch.linalg.svd(pair.b_OR.float() @ s_RR.T, full_matrices=False)
    norm = sizes_R.square().sum()
    if not bool(norm > 0):
        return torch.zeros(q_DR.shape[0], device=q_DR.device), 0.0
    return q_DR @ vt_RR[0], float(sizes_R[0].square() / norm)
