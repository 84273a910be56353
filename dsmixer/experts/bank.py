"""The experts of one projection, stacked.

Shapes: T tokens, D input width, O output width, E experts, R LoRA rank (padded), K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from dsmixer.experts.apart import Outputs, PerToken, sum_apart
from dsmixer.experts.assignment import Assignment
from dsmixer.experts.choice import MEASURED, FormTable
from dsmixer.experts.dropout import Dropout
from dsmixer.experts.few import ServedBank, is_small
from dsmixer.experts.forms import auto_form, forms
from dsmixer.experts.init import kaiming_rows, named_generator

RANK_MULTIPLE = 8  # grouped products want 16-byte strides, in bfloat16 eight elements


def padded_rank(ranks: Sequence[int]) -> int:
    """The R that holds every expert: the largest rank, rounded up to a multiple of eight."""
    return math.ceil(max(ranks) / RANK_MULTIPLE) * RANK_MULTIPLE


def lora_scaling(rank: int, alpha: float, rslora: bool) -> float:
    """PEFT's ``s = alpha / R``, or ``alpha / sqrt(R)`` for rsLoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class ExpertBank(nn.Module):
    """``y = sum_e w_e(x) s_e B_e A_e x`` for E experts.

    ``lora_A`` is ``[E, R, D]`` and ``lora_B`` is ``[E, R, O]``, PEFT's ``lora_B`` transposed, so that both
    flatten to the two factors of one wide product. An expert of a smaller rank leaves its last rows zero
    in both; their gradients are zero, so they stay zero.

    Args:
        names: the experts, in order.
        in_features: D.
        out_features: O.
        ranks: rank of each expert; 0 marks an expert that has nothing on this projection.
        alphas: PEFT's ``lora_alpha`` of each expert.
        rslora: scale by ``alpha / sqrt(R)``.
        compute: ``auto``, ``loop``, ``dense``, ``grouped``, ``blocked`` or ``fused``.
        rank: R, padded; None for what ``ranks`` needs. Banks of one projection on several ranks share it.
        device: where the weights live; ``meta`` counts without allocating.

    Attributes:
        table: what decides between the forms in ``auto``.
        small: whether a few tokens can as well meet the whole pool.
    """

    def __init__(
        self,
        names: Sequence[str],
        in_features: int,
        out_features: int,
        *,
        ranks: Sequence[int],
        alphas: Sequence[float],
        rslora: bool = False,
        compute: str = "auto",
        rank: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.in_features, self.out_features = in_features, out_features
        self.ranks, self.alphas, self.rslora = tuple(ranks), tuple(alphas), rslora
        self.rank = padded_rank(ranks) if rank is None else rank
        self.compute = compute
        self.table: FormTable = MEASURED
        self.small = is_small(len(names), self.rank)
        self.lora_A = nn.Parameter(torch.zeros(len(names), self.rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(len(names), self.rank, out_features, device=device))
        scaling = [lora_scaling(r, a, rslora) if r else 0.0 for r, a in zip(ranks, alphas, strict=True)]
        self.scaling = tuple(scaling)
        self._scaling_on: dict[torch.device, torch.Tensor] = {}
        self._served: ServedBank | None = None

    @property
    def num_experts(self) -> int:
        return len(self.names)

    def scaling_on(self, device: torch.device) -> torch.Tensor:
        """``s`` of each expert, ``[E]`` float32, kept on each device it was asked for."""
        if device not in self._scaling_on:
            self._scaling_on[device] = torch.tensor(self.scaling, dtype=torch.float32, device=device)
        return self._scaling_on[device]

    def num_weights(self) -> int:
        """Weights that train, without the rows that only pad a smaller rank."""
        return sum(self.ranks) * (self.in_features + self.out_features)

    @torch.no_grad()
    def start(self, seed: int, path: str) -> None:
        """Start every expert as PEFT does: ``lora_A`` uniform, ``lora_B`` zero."""
        if self.lora_A.is_meta:
            return
        self.lora_A.zero_()
        self.lora_B.zero_()
        for e, (name, rank) in enumerate(zip(self.names, self.ranks, strict=True)):
            if rank:
                rows = kaiming_rows(rank, self.in_features, named_generator(seed, path, name))
                self.lora_A[e, :rank].copy_(rows)

    @torch.no_grad()
    def set_expert(self, index: int, lora_a_RD: torch.Tensor, lora_b_OR: torch.Tensor) -> None:
        """Write one expert from PEFT's two matrices, ``[rank, D]`` and ``[O, rank]``."""
        rank = self.ranks[index]
        assert lora_a_RD.shape == (rank, self.in_features), (lora_a_RD.shape, rank, self.in_features)
        assert lora_b_OR.shape == (self.out_features, rank), (lora_b_OR.shape, rank, self.out_features)
        self.lora_A[index, :rank].copy_(lora_a_RD)
        self.lora_B[index, :rank].copy_(lora_b_OR.T)

    def forward(
        self, x_TD: torch.Tensor, assignment: Assignment, dropout: Dropout | None = None
    ) -> torch.Tensor:
        """The weighted sum of the experts' outputs, ``[T, O]``, in the dtype of ``x_TD``, which ``dropout``
        masks first."""
        kind = x_TD.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            # a form's two passes share one dtype, that of its input
            with torch.autocast(kind, enabled=False):
                return self.forward(x_TD, assignment, dropout)
        banks = (self.lora_A, self.lora_B, self.scaling_on(x_TD.device))
        if self.compute == "auto":
            return auto_form(x_TD, *banks, assignment, dropout, self.table)
        return forms[self.compute](x_TD, *banks, assignment, dropout)

    @property
    def served(self) -> ServedBank:
        """The weights laid out for a few tokens, made once."""
        if self._served is None or not self._served.shows(self.lora_A, self.lora_B):
            self._served = ServedBank(self.lora_A.data, self.lora_B.data, self.scaling)
        return self._served

    def forget(self) -> None:
        """Let go of what ``served`` made."""
        self._served = None

    def sum_apart(
        self,
        x_TD: torch.Tensor,
        assignment: Assignment,
        dropout: Dropout | None,
        per_token: PerToken,
        mask_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """A loss on what each token's experts put out by themselves, summed over real tokens; arguments as
        ``experts.apart.sum_apart``. The whole bank has to be here and gathered."""
        # pairs taken as tokens of one expert each leave a wide product of all experts mostly in vain
        form = forms["grouped"] if self.compute == "auto" else forms[self.compute]
        s_E, how = self.scaling_on(x_TD.device), Outputs(form, dropout)
        return sum_apart(x_TD, self.lora_A, self.lora_B, s_E, assignment, per_token, mask_T, how)
