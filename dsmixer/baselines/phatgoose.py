"""PHATGOOSE: a gate an expert, trained by itself after the expert, and routing by what the gates resemble.

Shapes: T tokens, D input width, E experts, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from dsmixer.baselines.adding import Delta, adding, wide
from dsmixer.baselines.arrow import top_softmax
from dsmixer.baselines.fitting import Fit, fit, trained
from dsmixer.baselines.interface import Fitted, Given
from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank


@dataclass(frozen=True)
class Phatgoose:
    """PHATGOOSE (arXiv 2402.05859).

    A vector v an expert and projection, from 0, trains on the expert's own rows with all else frozen and the
    output ``W u + s B A u * sigmoid(v . u)``. Then ``score_e(u) = LN(u) . LN(v_e) / sqrt(D)``, LN without
    affine terms, and the K largest scores go through a softmax, which is the softmax over all,
    renormalised.

    Attributes:
        top_k: K, its 2.
        fitting: its code's: 100 steps of AdamW at a constant 5e-3 after 6 % of warm-up. The batch is ours.
    """

    trains: ClassVar[bool] = True

    top_k: int = 2
    fitting: Fit = field(default=Fit(steps=100, batch_size=8, learning_rate=5e-3, warmup_ratio=0.06))

    def __call__(self, given: Given) -> Fitted:
        """One short training an expert; arguments as ``Method``.

        ``found``: ``losses`` by expert, the mean loss of its first and of its last ten steps, nats.

        Raises:
            UserError: an expert has no rows of its own.
        """
        mixture = given.mixture
        rows = {name: given.rows.of(name) for name in mixture.expert_names}
        vectors: dict[str, list[torch.Tensor]] = {path: [] for path in mixture.mixers}
        losses = {}
        for e, name in enumerate(mixture.expert_names):
            gates = {path: _start(mixer.bank) for path, mixer in mixture.mixers.items()}
            deltas = {path: _trained_delta(mixture.mixers[path].bank, e, v_D) for path, v_D in gates.items()}
            with adding(mixture.model, deltas):
                per_step = fit(
                    mixture.model,
                    list(gates.values()),
                    given.rows,
                    rows[name],
                    self.fitting,
                    seed=given.seed,
                    purpose=f"phatgoose {name}",
                )
            losses[name] = first_and_last(per_step)
            for path, v_D in gates.items():
                vectors[path].append(v_D.detach())
        stacked = {path: torch.stack(of_path) for path, of_path in vectors.items()}
        deltas = {path: self._delta(mixture.mixers[path].bank, v_ED) for path, v_ED in stacked.items()}
        return Fitted(
            lambda _: adding(mixture.model, deltas),
            num_trainable=_numel(stacked),
            num_steps=sum(self.fitting.num_steps(len(own)) for own in rows.values()),
            found={"losses": losses},
        )

    def _delta(self, bank: ExpertBank, v_ED: torch.Tensor) -> Delta:
        def delta(u_TD: torch.Tensor) -> torch.Tensor:
            return bank(u_TD, top_softmax(scores(wide(u_TD), v_ED), self.top_k))

        return delta


def scores(u_TD: torch.Tensor, v_ED: torch.Tensor) -> torch.Tensor:
    """``LN(u) . LN(v_e) / sqrt(D)``, ``[T, E]``, at most ``sqrt(D)``; 0 for a gate that never moved."""
    width = u_TD.shape[1:]
    normed_ED = F.layer_norm(v_ED.to(u_TD.dtype), width)
    return F.layer_norm(u_TD, width) @ normed_ED.T / math.sqrt(u_TD.shape[1])


def first_and_last(losses: list[float]) -> tuple[float, float]:
    """Means over the first and the last ten steps, or over fewer where there are fewer."""
    ends = losses[:10], losses[-10:]
    return sum(ends[0]) / len(ends[0]), sum(ends[1]) / len(ends[1])


def _start(bank: ExpertBank) -> nn.Parameter:
    return trained(torch.zeros(bank.in_features, device=bank.lora_A.device))


def _trained_delta(bank: ExpertBank, expert: int, v_D: torch.Tensor) -> Delta:
    def delta(u_TD: torch.Tensor) -> torch.Tensor:
        gate_T1 = torch.sigmoid(wide(u_TD) @ v_D.to(wide(u_TD).dtype))[:, None]
        only_T1 = torch.full_like(gate_T1, expert, dtype=torch.int64)
        return bank(u_TD, Assignment(bank.num_experts, indices_TK=only_T1, weights_TK=gate_T1))

    return delta


def _numel(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
