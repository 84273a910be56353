"""One LoRA on everything: what a user would train without experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from dsmixer.baselines.adding import Delta, adding
from dsmixer.baselines.fitting import Fit, count, fit, trained
from dsmixer.baselines.interface import Fitted, Given
from dsmixer.baselines.merged import Merged
from dsmixer.baselines.phatgoose import first_and_last
from dsmixer.experts.bank import ExpertBank
from dsmixer.experts.init import kaiming_rows, named_generator


@dataclass(frozen=True)
class OneLora:
    """One plain LoRA on the mixture's projections, trained on all rows: the experts' and the routers'.

    It starts as PEFT's does. By default it has as many weights as all experts together.

    Attributes:
        rank: R; None: the sum of the experts' ranks.
        scaling: s; None: the experts' mean.
        fitting: steps of the shared loop.
    """

    trains: ClassVar[bool] = True

    rank: int | None = None
    scaling: float | None = None
    fitting: Fit = field(
        default=Fit(steps=None, batch_size=8, learning_rate=2e-4, warmup_ratio=0.1, scheduler="cosine")
    )

    def __call__(self, given: Given) -> Fitted:
        """Train it; arguments as ``Method``. ``found``: ``rank``, ``losses`` as PHATGOOSE has them."""
        mixture = given.mixture
        rank = sum(mixture.config.rank_list) if self.rank is None else self.rank
        loras = {
            path: PlainLora(mixer.bank, path, rank, self.scaling, given.seed)
            for path, mixer in mixture.mixers.items()
        }
        deltas: dict[str, Delta] = dict(loras)
        parameters = [p for lora in loras.values() for p in (lora.a_RD, lora.b_OR)]
        with adding(mixture.model, deltas):
            losses = fit(
                mixture.model,
                parameters,
                given.all_rows,
                given.all_rows.everything,
                self.fitting,
                seed=given.seed,
                purpose="one_lora",
            )
        merged = Merged({path: lora.matrices() for path, lora in loras.items()})
        return Fitted(
            lambda _: merged.under(mixture),
            num_trainable=count(parameters),
            num_steps=len(losses),
            found={"rank": rank, "losses": first_and_last(losses)},
            merged=merged,
        )


class PlainLora:
    """A LoRA that trains beside a bank's projection."""

    def __init__(self, bank: ExpertBank, path: str, rank: int, scaling: float | None, seed: int) -> None:
        device = bank.lora_A.device
        start_RD = kaiming_rows(rank, bank.in_features, named_generator(seed, path, "plain"))
        self.a_RD: nn.Parameter = trained(start_RD.to(device))
        self.b_OR: nn.Parameter = trained(torch.zeros(bank.out_features, rank, device=device))
        self.scaling = sum(bank.scaling) / len(bank.scaling) if scaling is None else scaling

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """``s B A x``."""
        h_TR = nn.functional.linear(x_TD, self.a_RD.to(x_TD.dtype))
        return self.scaling * nn.functional.linear(h_TR, self.b_OR.to(x_TD.dtype))

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A, and B with the scale inside."""
        return self.a_RD.detach(), self.scaling * self.b_OR.detach()
