"""The routers' loss as part of a model's own loss, for trainers that know of no other.

    loss = cross-entropy + share * mean over routers of  (its loss summed over real tokens) / (real tokens)

``share`` is 1 where the model takes the mean over the batch's own targets. A trainer that accumulates tells
the model the targets of the whole step (``num_items_in_batch``); ``share`` is then the batch's part of them,
so that the sum over the step weighs each batch's routing as it weighs its cross-entropy. It is added in
training alone, and only where labels are given.

TRL's trainers make the cross-entropy themselves from what a fused head puts out, and read the balance loss of
a model with routers as ``aux_loss``, which they average over the step's batches. They find it here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from weakref import ref

import torch
from torch import nn

from dsmixer.config.errors import UserError
from dsmixer.losses.interface import RoutingLoss
from dsmixer.losses.task import IGNORED
from dsmixer.losses.usage import num_tokens
from dsmixer.model.inject import Mixture
from dsmixer.routing.context import BatchRouting
from dsmixer.routing.statistics import RouterOutput

ASKED, WEIGHT = "output_router_logits", "router_aux_loss_coef"
"""Keys of a model's configuration: that it has routers, and what a trainer weighs their loss with."""


class RoutingInLoss:
    """Adds the routers' loss to what the model's forward pass answers, until ``remove`` is called.

    Args:
        mixture: on a transformers model.
        loss: of one router; it must not need the usage of the step before, which no trainer keeps.

    Attributes:
        last: the mean over routers of the last training pass, nats, detached; None before the first.
    """

    def __init__(self, mixture: Mixture, loss: RoutingLoss) -> None:
        self.mixture, self.loss = mixture, loss
        self.last: torch.Tensor | None = None
        self._stack, self._active, self._asked = ExitStack(), False, False
        self._awaited: ref[_Awaited] | None = None
        model = mixture.model
        # a base with routers of its own says so, and its trainer's weight is for them
        self._own_routers = hasattr(_text_config(model), ASKED)
        if not self._own_routers:
            setattr(_text_config(model), ASKED, False)
            setattr(_text_config(model), WEIGHT, 1.0)
        self._handles = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )

    def remove(self) -> None:
        """Leave the model's loss as it was."""
        for handle in self._handles:
            handle.remove()
        if not self._own_routers:
            delattr(_text_config(self.mixture.model), ASKED)
            delattr(_text_config(self.mixture.model), WEIGHT)

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        context = self.mixture.context
        self._asked = bool(kwargs.get(ASKED))
        if ASKED in kwargs and not self._own_routers:
            # the base knows no such thing; a fused head would ask its configuration, so it is told no
            told = {ASKED: False} if kwargs.get("fused_lm_head") else {}
            kwargs = {**{key: value for key, value in kwargs.items() if key != ASKED}, **told}
        weighed = any(router.weight.requires_grad for router in self.mixture.routers.values())
        self._active = model.training and torch.is_grad_enabled() and weighed and _labels(given) is not None
        self._active = self._active and context.routing.uses_router
        if self._active:
            self._check_turn(model)
            num_routers = len(self.mixture.routers)

            def mean_of(output: RouterOutput, index: int) -> torch.Tensor:
                even_E = torch.full_like(output.p_TE[0].detach(), 1.0 / output.p_TE.shape[1])
                with torch.autocast(output.p_TE.device.type, enabled=False):
                    return self.loss(output, even_E, 1.0) / num_tokens(output).clamp_min(1) / num_routers

            self._stack.enter_context(context.recording(_real_tokens(model, given), router_loss=mean_of))
        elif torch.is_grad_enabled():
            context.clear()
        else:
            self._stack.enter_context(context.aside())
        return args, kwargs

    def _after(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self._stack.close()
        loss = self.mixture.context.take_loss() if self._active else None
        if loss is None:
            if self._asked and not self._own_routers and output is not None:
                output.aux_loss = next(model.parameters()).new_zeros(())
            return output
        self.last = loss.detach()
        awaited = _Awaited()
        self._awaited = ref(awaited)
        loss = _Watched.apply(loss, awaited)
        return self._joined(model, kwargs, output, loss)

    def _check_turn(self, model: nn.Module) -> None:
        """Layers that are run again in the backward pass have to find the batch of their own forward pass."""
        awaited = self._awaited() if self._awaited is not None else None
        if awaited is None or awaited.done:
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            fix = "call backward after each forward pass, or turn gradient checkpointing off"
            raise UserError("a second training pass before the first one's backward pass", fix=fix)

    def _joined(self, model: nn.Module, kwargs: dict[str, Any], output: Any, loss: torch.Tensor) -> Any:
        share = _share(model, kwargs)
        if isinstance(output, tuple):
            return (output[0] + share * loss, *output[1:])
        if getattr(output, "loss", None) is not None:
            output.loss = output.loss + share * loss
        if self._asked:
            weight = getattr(_text_config(model), WEIGHT) or 1.0
            own = getattr(output, "aux_loss", None)
            output.aux_loss = loss / weight if own is None else own + loss / weight
        return output


class _Awaited:
    """A backward pass that is to come; it lives as long as the graph that it would go through."""

    done = False


class _Watched(torch.autograd.Function):
    """The identity, which tells when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, awaited: _Awaited) -> torch.Tensor:
        ctx.awaited = awaited
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.awaited.done = True
        return grad, None


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _labels(given: Mapping[str, Any]) -> torch.Tensor | None:
    shifted = given.get("shift_labels")
    return given.get("labels") if shifted is None else shifted


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _real_tokens(model: nn.Module, given: Mapping[str, Any]) -> BatchRouting:
    """Which tokens count: those that attention is given, and of a decoder behind an encoder its targets."""
    mask = given.get("attention_mask")
    flat = mask.flatten().float() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    if not _is_encoder_decoder(model):
        return BatchRouting(mask_T=flat)
    labels = _labels(given)
    assert labels is not None
    return BatchRouting(mask_T=(labels != IGNORED).flatten().float(), encoder=BatchRouting(mask_T=flat))


def _share(model: nn.Module, given: Mapping[str, Any]) -> torch.Tensor | float:
    """The batch's part of the step's targets, where the trainer has told how many the step has."""
    of_step, labels = given.get("num_items_in_batch"), _labels(given)
    if of_step is None or labels is None:
        return 1.0
    if given.get("shift_labels") is None and not _is_encoder_decoder(model):
        labels = labels[..., 1:]
    return (labels != IGNORED).sum() / of_step
