"""What the routers of a model did in one optimizer step, as one small buffer that is reduced once.

Shapes: M routers, E experts, G domains, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dsmixer.routing.modes import Choice

MAX_DOMAIN_CELLS = 4096  # domains x experts counted apart in each router; above that only the sums


@dataclass(frozen=True)
class RouterOutput:
    """One router's work on one micro-batch, with its graph where gradients are wanted.

    Attributes:
        logits_TE: ``G x``.
        p_TE: ``softmax(logits)``.
        choice: what the routing mode made of it.
        mask_T: 1 for real tokens, 0 for padding; None means that all are real.
    """

    logits_TE: torch.Tensor
    p_TE: torch.Tensor
    choice: Choice
    mask_T: torch.Tensor | None
    _made: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def token_sum(self, values_T: torch.Tensor) -> torch.Tensor:
        """Sum over real tokens along the first dimension."""
        if self.mask_T is None:
            return values_T.sum(0)
        shape = (-1,) + (1,) * (values_T.dim() - 1)
        return (values_T * self.mask_T.to(values_T.dtype).view(shape)).sum(0)

    def entropy_T(self) -> torch.Tensor:
        """``H(p(x))`` of each token, nats."""
        return self._once("entropy", lambda: _Entropy.apply(self.p_TE))

    def p_sum_E(self) -> torch.Tensor:
        """Sum of p over real tokens."""
        return self._once("p sum", lambda: self.token_sum(self.p_TE))

    def _once(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """One pass over ``[T, E]`` for a loss and the statistics; another only where a graph is wanted and
        the first had none."""
        made = self._made.get(name)
        if made is None or (torch.is_grad_enabled() and self.p_TE.requires_grad and not made.requires_grad):
            made = self._made[name] = make()
        return made


class _Entropy(torch.autograd.Function):
    """Of p alone, which the softmax keeps anyway; where p is 0, it stays finite."""

    @staticmethod
    def forward(ctx: Any, p_TE: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(p_TE)
        return torch.special.entr(p_TE).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (p_TE,) = ctx.saved_tensors
        return -grads[0][:, None] * (1 + p_TE.clamp_min(torch.finfo(p_TE.dtype).tiny).log())


@dataclass
class RoutingStatistics:
    """Sums over the real tokens of a step, one row a router.

    ``p_ME`` sums p and ``p_squared_ME`` p²; ``weight_ME`` sums the weights of the chosen experts,
    renormalised to 1 a token; ``top1_ME`` counts first choices and ``chosen_ME`` choices of any rank;
    ``smooth_ME`` sums ``softmax(logits / tau)``; ``entropy_M`` sums H(p); ``tokens_M`` counts tokens;
    ``domain_MGE`` counts first choices by domain.
    """

    num_routers: int
    num_experts: int
    num_domains: int = 0
    device: torch.device | str = "cpu"
    smooth_temperature: float | None = None
    buffer: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.num_domains * self.num_experts > MAX_DOMAIN_CELLS:
            self.num_domains = 0
        width = 6 * self.num_experts + 2 + self.num_domains * self.num_experts
        self.buffer = torch.zeros(self.num_routers, width, dtype=torch.float32, device=self.device)

    def _columns(self, index: int) -> torch.Tensor:
        return self.buffer[:, index * self.num_experts : (index + 1) * self.num_experts]

    @property
    def p_ME(self) -> torch.Tensor:
        return self._columns(0)

    @property
    def p_squared_ME(self) -> torch.Tensor:
        return self._columns(1)

    @property
    def weight_ME(self) -> torch.Tensor:
        return self._columns(2)

    @property
    def top1_ME(self) -> torch.Tensor:
        return self._columns(3)

    @property
    def chosen_ME(self) -> torch.Tensor:
        return self._columns(4)

    @property
    def smooth_ME(self) -> torch.Tensor:
        return self._columns(5)

    @property
    def entropy_M(self) -> torch.Tensor:
        return self.buffer[:, 6 * self.num_experts]

    @property
    def tokens_M(self) -> torch.Tensor:
        return self.buffer[:, 6 * self.num_experts + 1]

    @property
    def domain_MGE(self) -> torch.Tensor:
        rest = self.buffer[:, 6 * self.num_experts + 2 :]
        return rest.view(self.num_routers, self.num_domains, self.num_experts)

    @torch.no_grad()
    def record(self, router: int, output: RouterOutput, domains_T: torch.Tensor | None) -> None:
        """Add one router's micro-batch."""
        p_TE, choice = output.p_TE.detach().float(), output.choice
        weights_TE = torch.zeros_like(p_TE).scatter_add_(
            1, choice.indices_TK, choice.shares_TK.detach().float()
        )
        first_TE = torch.zeros_like(p_TE).scatter_(1, p_TE.argmax(1, keepdim=True), 1.0)
        chosen_TE = (weights_TE if choice.gate_TE is None else choice.gate_TE.detach()) > 0
        self.p_ME[router] += output.p_sum_E().detach().float()
        self.p_squared_ME[router] += output.token_sum(p_TE.square())
        self.weight_ME[router] += output.token_sum(weights_TE)
        self.top1_ME[router] += output.token_sum(first_TE)
        self.chosen_ME[router] += output.token_sum(chosen_TE.float())
        self.entropy_M[router] += output.token_sum(output.entropy_T().detach().float())
        mask_T = output.mask_T
        self.tokens_M[router] += p_TE.shape[0] if mask_T is None else mask_T.sum()
        if self.smooth_temperature is not None:
            smooth_TE = torch.softmax(output.logits_TE.detach().float() / self.smooth_temperature, dim=1)
            self.smooth_ME[router] += output.token_sum(smooth_TE)
        if self.num_domains and domains_T is not None:
            # picking the real tokens out would make the host wait for a device
            real_TE = first_TE * (domains_T >= 0)[:, None]
            self.domain_MGE[router].index_add_(0, domains_T.clamp_min(0), real_TE)

    def usage(self, kind: str) -> torch.Tensor:
        """``f̄ [M, E]`` that RSL wants: ``topk`` mean renormalised weight, ``top1`` frequency, ``smooth``.

        Each row sums to 1. A router that saw no token answers 1/E.
        """
        sums_ME = {"topk": self.weight_ME, "top1": self.top1_ME, "smooth": self.smooth_ME}[kind]
        total_M1 = sums_ME.sum(1, keepdim=True)
        even = torch.full_like(sums_ME, 1.0 / self.num_experts)
        return torch.where(total_M1 > 0, sums_ME / total_M1.clamp_min(1e-30), even)
