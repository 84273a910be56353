"""A mixer's answer to a few tokens, with all that is the same for every token looked up once.

A decoded token takes a mixer less time than Python takes to find its way through modules and forms. What
decides whether this way may be taken, and what it works with, is therefore kept: ``current`` looks whether it
still holds, in a few comparisons.

Shapes: T tokens, D input width, O output width, K experts a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

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
        if mixer.shared or mixer.exchange.travels or bank.compute != "auto":
            return None
        weights = [of._parameters.get(name) for of, name in _weights_of(mixer)]
        if not all(isinstance(of, nn.Parameter) and not hasattr(of, "ds_id") for of in weights):
            return None
        a_ERD, b_ERO = bank.lora_A, bank.lora_B
        if a_ERD.dtype != b_ERO.dtype or not (a_ERD.is_contiguous() and b_ERO.is_contiguous()):
            return None
        if _disturbed(mixer, _hooks_of(mixer), a_ERD.device.type):
            return None
        return cls(mixer)

    def __init__(self, mixer: MixedLinear) -> None:
        self._mixer, bank = mixer, mixer.bank
        self._outside = mixer._outside
        self._context, router = self._outside
        self._routing = self._context.routing
        self._weights = [
            (of._parameters, name, of._parameters[name], _place(of, name)) for of, name in _weights_of(mixer)
        ]
        self._modules, self._base, self._bank = mixer._modules, mixer.base, bank
        self._hooks = _hooks_of(mixer)
        self._router_weight, self._served = router.weight.detach(), bank.served
        self._dtype, self._device = bank.lora_A.dtype, bank.lora_A.device.type
        self._width, top_k = bank.in_features, min(self._routing.top_k, bank.num_experts)
        self._most = self._width * most_tokens(bank.lora_A, top_k, bank.num_experts, small=bank.small)

    def current(self) -> bool:
        """Whether nothing has changed that decides about it."""
        context, modules = self._context, self._modules
        if self._mixer._outside is not self._outside or context.routing is not self._routing:
            return False
        if modules["bank"] is not self._bank or modules["base"] is not self._base:
            return False
        if not context.unobserved or self._bank.compute != "auto":
            return False
        for owner, name, weights, place in self._weights:
            if weights is None or owner.get(name) is not weights or weights.data_ptr() != place:
                return False
        return not _disturbed(self._mixer, self._hooks, self._device)

    def takes(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether these tokens are few, and what the base made of them can be added to."""
        return 0 < x.numel() <= self._most and x.dtype is y.dtype is self._dtype and y.is_contiguous()

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the experts put out for ``x [..., D]``, added to the base's ``y [..., O]``, perhaps in it."""
        x_TD = x.reshape(-1, self._width)
        choice = topk_of_logits(logits_of(x_TD, self._router_weight), self._routing)
        return self._served.add(y.view(len(x_TD), -1), x_TD, choice.indices_TK, choice.weights_TK).view_as(y)


def _weights_of(mixer: MixedLinear) -> tuple[tuple[nn.Module, str], ...]:
    """Who owns what an answer is made of."""
    return (mixer.bank, "lora_A"), (mixer.bank, "lora_B"), (mixer._outside[1], "weight")


def _hooks_of(mixer: MixedLinear) -> tuple[dict[int, Any], ...]:
    """Those that would see, or change, what is passed by or altered in place."""
    watched = (mixer.base, mixer.bank, mixer._outside[1])
    own = (of for m in watched for of in (m._forward_hooks, m._forward_pre_hooks))
    return *own, torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks


def _disturbed(mixer: MixedLinear, hooks: tuple[dict[int, Any], ...], device: str) -> bool:
    """Whether hooks, dropout or autocast want a part in it."""
    if any(hooks) or (mixer.training and mixer.dropout):
        return True
    return torch.is_autocast_enabled(device)


def _place(module: nn.Module, name: str) -> int:
    """Where in memory a parameter lies."""
    return int(module.get_parameter(name).data_ptr())
