"""Cases for the compute forms, and the plain formula that they are held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.dropout import Dropout
from dsmixer.experts.forms import Form

LEAVES = ("x", "a", "b", "weights")
Leaves = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """T tokens, D and O wide, E experts of rank R; K of them a token, or a gate over all (K = 0)."""

    T: int
    D: int
    O: int
    E: int
    R: int
    K: int
    lonely: bool = False  # experts above 0 hear nothing
    absent: bool = False  # some pairs have no expert
    strided: bool = False  # inputs are not contiguous
    spread: bool = False  # the incoming gradient is one row for all tokens, of stride 0
    summed: bool = False  # it is one number for all
    dropout: float = 0.0
    seed: int = 0
    dtype: torch.dtype = torch.float64  # of x
    bank_dtype: torch.dtype = torch.float64

    @property
    def weights_dtype(self) -> torch.dtype:
        """A router's weights have no less than float32."""
        return torch.promote_types(self.bank_dtype, torch.float32)


def leaves_of(case: Case, device: str = "cpu") -> tuple[Leaves, torch.Tensor]:
    """Leaves with gradients, and the indices ``[T, K]``."""
    rng = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        laid = (*shape[:-2], shape[-1], shape[-2]) if case.strided else shape
        drawn = torch.randn(*laid, generator=rng, dtype=torch.float64).to(device, dtype)
        return (drawn.transpose(-1, -2) if case.strided else drawn).requires_grad_()

    num_weights = case.K or case.E
    leaves = {
        "x": draw(case.T, case.D, dtype=case.dtype),
        "a": draw(case.E, case.R, case.D, dtype=case.bank_dtype),
        "b": draw(case.E, case.R, case.O, dtype=case.bank_dtype),
        "weights": draw(case.T, num_weights, dtype=case.weights_dtype),
    }
    if case.lonely or case.absent:
        lowest, highest = -1 if case.absent else 0, 1 if case.lonely else case.E
        indices_TK = torch.randint(lowest, highest, (case.T, num_weights), generator=rng)
    else:
        indices_TK = torch.rand(case.T, case.E, generator=rng).argsort(1)[:, :num_weights].contiguous()
    return leaves, indices_TK.to(device)


def exact_of(leaves: Leaves) -> Leaves:
    """The same numbers in float64, as leaves of their own."""
    return {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}


def scaling_of(case: Case, device: str | torch.device = "cpu") -> torch.Tensor:
    return 0.5 + torch.arange(case.E, dtype=torch.float32, device=device) / 4


def dropout_of(case: Case) -> Dropout | None:
    return Dropout(case.dropout, seed=case.seed + 2) if case.dropout else None


def plain_formula(leaves: Leaves, indices_TK: torch.Tensor, case: Case) -> torch.Tensor:
    """``sum_k w_tk s_e B_e A_e x_t`` in one einsum over gathered experts; of the package, dropout's mask."""
    x, a, b, weights = (leaves[name] for name in LEAVES)
    s_E, dropout = scaling_of(case, x.device).to(x.dtype), dropout_of(case)
    if dropout is not None:
        x = x * dropout.kept(x).to(x.dtype) / (1 - dropout.probability)
    if not case.K:
        return torch.einsum("te,e,erd,ero,td->to", weights, s_E, a, b, x)
    here, safe = (indices_TK >= 0).to(x.dtype), indices_TK.clamp_min(0)
    return torch.einsum("tk,tkrd,tkro,td->to", weights * here * s_E[safe], a[safe], b[safe], x)


def run_form(form: Form, leaves: Leaves, indices_TK: torch.Tensor, case: Case) -> torch.Tensor:
    x, a, b, weights = (leaves[name] for name in LEAVES)
    if case.K:
        assignment = Assignment(case.E, indices_TK=indices_TK, weights_TK=weights)
    else:
        assignment = Assignment(case.E, gate_TE=weights)
    return form(x, a, b, scaling_of(case, x.device), assignment, dropout_of(case))


def gradients(y: torch.Tensor, leaves: Leaves, case: Case) -> Leaves:
    """Of the leaves that want one."""
    named = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if case.summed:
        return dict(zip(named, torch.autograd.grad(y.sum(), list(named.values())), strict=True))
    rng = torch.Generator().manual_seed(case.seed + 1)
    drawn = torch.randn(1 if case.spread else len(y), case.O, generator=rng, dtype=torch.float64)
    incoming = drawn.to(y.device, y.dtype).expand(y.shape)
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), incoming), strict=True))
