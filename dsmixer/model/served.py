"""A mixer's answer to a few tokens, with all that is the same for every token looked up once.

A decoded token takes a mixer less time than Python takes to find its way through modules and forms. What
decides whether this way may be taken, and what it works with, is therefore kept: ``current`` looks whether it
still holds, in a few comparisons.

Shapes: T tokens, D input width, O output width, K experts a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from dsmixer.experts.few import most_tokens
from dsmixer.routing.modes import topk_of_logits
from dsmixer.routing.router import logits_of

if TYPE_CHECKING:
    from dsmixer.model.mixed_linear import MixedLinear


class ServedMixer:
    """See the module. Made by ``of``."""

    @classmethod
    def of(cls, mixer: MixedLinear) -> ServedMixer | None:
        """None where tokens want more than an answer: other routings than renormalised ``topk`` for all rows,
        statistics or losses, dropout, hooks; or other experts: on other ranks, by a router that projections
        share, in a form that was asked for, in another dtype, or released by ZeRO-3."""
        context, bank = mixer.context, mixer.bank
        routing = context.routing
        if not context.unobserved or routing.rows is not None or not routing.renormalized_topk:
            return None
        if mixer.shared or mixer.exchange.travels or bank.compute != "auto" or hasattr(bank.lora_A, "ds_id"):
            return None
        made = cls(mixer)
        return made if bank.lora_A.dtype == bank.lora_B.dtype and made.current() else None

    def __init__(self, mixer: MixedLinear) -> None:
        self._mixer, bank = mixer, mixer.bank
        self._context, router = mixer._outside
        self._routing = self._context.routing
        weights = ((bank, "lora_A"), (bank, "lora_B"), (router, "weight"))
        self._weights = [
            (of._parameters, name, of._parameters[name], _place(of, name)) for of, name in weights
        ]
        watched = (mixer.base, bank, router)
        self._hooks = [of for m in watched for of in (m._forward_hooks, m._forward_pre_hooks)]
        self._router_weight, self._served = router.weight.detach(), bank.served
        self._dtype, self._device = bank.lora_A.dtype, bank.lora_A.device.type
        self._width, top_k = bank.in_features, min(self._routing.top_k, bank.num_experts)
        self._most = self._width * most_tokens(bank.lora_A, top_k, bank.num_experts, small=bank.small)

    def current(self) -> bool:
        """Whether nothing has changed that decides about it."""
        context = self._context
        if context.routing is not self._routing or not context.unobserved or any(self._hooks):
            return False
        if self._mixer.training and self._mixer.dropout:
            return False
        for owner, name, weights, place in self._weights:
            if weights is None or owner[name] is not weights or weights.data_ptr() != place:
                return False
        return not torch.is_autocast_enabled(self._device)

    def takes(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether these tokens are few, and what the base made of them can be added to."""
        return 0 < x.numel() <= self._most and x.dtype is y.dtype is self._dtype and y.is_contiguous()

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the experts put out for ``x [..., D]``, added to the base's ``y [..., O]``, perhaps in it."""
        x_TD = x.reshape(-1, self._width)
        choice = topk_of_logits(logits_of(x_TD, self._router_weight), self._routing)
        return self._served.add(y.view(len(x_TD), -1), x_TD, choice.indices_TK, choice.weights_TK).view_as(y)


def _place(module: nn.Module, name: str) -> int:
    """Where in memory a parameter lies."""
    return int(module.get_parameter(name).data_ptr())
