"""MoLE: a gate that reads what the experts put out.

Shapes: T tokens, D input width, O output width, E experts, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from dsmixer.baselines.adding import Delta, adding, wide
from dsmixer.baselines.fitting import Fit, GateLoss, count, fit, trained
from dsmixer.baselines.interface import Fitted, Given
from dsmixer.baselines.phatgoose import first_and_last
from dsmixer.experts.bank import ExpertBank
from dsmixer.losses.mean_entropy import MoleBalanceLoss
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.routing.modes import Routing, soft


@dataclass(frozen=True)
class Mole:
    """MoLE (arXiv 2404.13628).

    Of each token, the experts' outputs ``E_1 .. E_E`` are put end to end and normalised (LN without affine
    terms); ``eps = e . LN([E_1 .. E_E])`` with ``e [E, E * O]``, ``p = softmax(eps / tau)``, and the output
    is ``W x + sum_i p_i E_i``. Only e and tau train, on the task and on MoLE's balance loss. MoLE has one
    gate a block over all tokens of a picture; here each projection has its own and speaks token by token,
    as all methods here do. e starts at 0, so p uniform; tau at 1, as the exponential of what trains.

    Attributes:
        balance: weight of the balance loss, its 0.5; 0: none.
        fitting: its 800 steps of 12 rows at 1e-5.
    """

    trains: ClassVar[bool] = True

    balance: float = 0.5
    fitting: Fit = field(default=Fit(steps=800, batch_size=12, learning_rate=1e-5))

    def __call__(self, given: Given) -> Fitted:
        """Train the gates on all rows; arguments as ``Method``.

        ``found``: ``temperatures``, the least and the largest tau; ``losses``, the task's mean over the
        first and the last ten steps, nats.
        """
        mixture = given.mixture
        gate_loss = GateLoss(MoleBalanceLoss(alpha=self.balance)) if self.balance else None
        gates = {path: MoleGate(mixer, gate_loss) for path, mixer in mixture.mixers.items()}
        deltas: dict[str, Delta] = dict(gates)
        parameters = [p for gate in gates.values() for p in (gate.e, gate.log_tau)]
        with adding(mixture.model, deltas):
            losses = fit(
                mixture.model,
                parameters,
                given.rows,
                given.rows.everything,
                self.fitting,
                seed=given.seed,
                purpose="mole",
                gate_loss=gate_loss,
            )
        temperatures = [float(gate.log_tau.detach().exp()) for gate in gates.values()]
        return Fitted(
            lambda _: adding(mixture.model, deltas),
            num_trainable=count(parameters),
            num_steps=len(losses),
            found={
                "temperatures": (min(temperatures), max(temperatures)),
                "losses": first_and_last(losses),
            },
        )


class MoleGate:
    """The gate of one projection, and with it what the projection adds."""

    def __init__(self, mixer: MixedLinear, gate_loss: GateLoss | None) -> None:
        bank = mixer.bank
        width, device = bank.num_experts * bank.out_features, bank.lora_A.device
        self.e: nn.Parameter = trained(torch.zeros(bank.num_experts, width, device=device))
        self.log_tau: nn.Parameter = trained(torch.zeros((), device=device))
        self._bank, self._stream, self._gate_loss = bank, mixer.stream, gate_loss

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` to ``[T, O]``."""
        outputs_TEO = expert_outputs(x_TD, self._bank)
        joined_TF = wide(outputs_TEO.flatten(1))
        normed_TF = F.layer_norm(joined_TF, joined_TF.shape[1:])
        logits_TE = normed_TF @ self.e.T.to(normed_TF.dtype) / self.log_tau.exp()
        p_TE = torch.softmax(logits_TE, dim=1)
        if self._gate_loss is not None:
            self._gate_loss.record(logits_TE, p_TE, soft(p_TE, Routing(mode="soft")), self._stream)
        return torch.einsum("te,teo->to", p_TE.to(outputs_TEO.dtype), outputs_TEO)


def expert_outputs(x_TD: torch.Tensor, bank: ExpertBank) -> torch.Tensor:
    """``s_e B_e A_e x`` of every expert, ``[T, E, O]``: the one method that needs them apart."""
    a_ERD, b_ERO = (weight.to(x_TD.dtype) for weight in (bank.lora_A, bank.lora_B))
    s_E11 = bank.scaling_on(x_TD.device).to(x_TD.dtype)[:, None, None]
    return torch.einsum("td,erd,ero->teo", x_TD, a_ERD, b_ERO * s_E11)
