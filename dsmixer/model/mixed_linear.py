"""A frozen projection with its experts beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsmixer.experts.apart import PerToken
from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank
from dsmixer.experts.dropout import Dropout, drop
from dsmixer.model.served import ServedMixer
from dsmixer.placement.exchange import Dispatched, Exchange, LocalExchange
from dsmixer.routing.context import RoutingContext, Stream
from dsmixer.routing.router import Router


class MixedLinear(nn.Module):
    """``y = W0 x + sum_{e chosen by x} w_e(x) s_e B_e A_e dropout(x)``.

    Args:
        base: the frozen projection, ``nn.Linear``, transformers' ``Conv1D`` or a quantised linear layer.
        bank: the experts.
        router: the router that chooses among them.
        router_index: row of the router in the step's statistics.
        context: shared by all mixers of the model.
        exchange: brings tokens to their experts; None: all experts are here.
        dropout: probability; one mask a token for all experts of the mixer.
        shared: whether other projections of the block use the same router.
        owns_router: whether the router's weights are registered here. With one router a block, the first
            projection owns them and the others only call it.
        stream: whose tokens the projection sees.
    """

    def __init__(
        self,
        base: nn.Module,
        bank: ExpertBank,
        router: Router,
        *,
        router_index: int,
        context: RoutingContext,
        exchange: Exchange | None = None,
        dropout: float = 0.0,
        shared: bool = False,
        owns_router: bool = True,
        stream: Stream = "decoder",
    ) -> None:
        super().__init__()
        self.base = base
        self.bank = bank
        if owns_router:
            self.router = router
        # a plain tuple keeps context and a foreign router out of this module's state
        self._outside: tuple[RoutingContext, Router] = (context, router)
        self.exchange: Exchange = LocalExchange() if exchange is None else exchange
        self.router_index, self.shared, self.owns_router = router_index, shared, owns_router
        self.dropout, self.stream = dropout, stream
        self._served: ServedMixer | None = None

    @property
    def context(self) -> RoutingContext:
        return self._outside[0]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., D]`` to ``[..., O]``."""
        y = self.base(x, *args, **kwargs)
        if not torch.is_grad_enabled():
            if self._served is None or not self._served.current():
                self._served = ServedMixer.of(self)
            if self._served is not None and self._served.takes(x, y):
                return self._served.add(x, y)
        context, router = self._outside
        if context.routing.mode == "none":
            return y
        x_TD = _in_autocast(x.reshape(-1, x.shape[-1]))
        shared_input = x if self.shared else None
        assignment = context.assign(
            router,
            self.router_index,
            x_TD,
            shared_input=shared_input,
            stream=self.stream,
            num_rows=x.shape[0],
        )

        travels = self.exchange.travels and not assignment.here

        def dispatch() -> Dispatched:
            sent_TD = drop(x_TD, self._draw_dropout()) if travels else x_TD
            return self.exchange.dispatch(sent_TD, assignment)

        # one exchange serves a block; where nothing travels, each projection drops inputs by itself, and its
        # form keeps the input that the block shares instead of a dropped copy
        sent = context.once_a_block(assignment, dispatch) if travels and self.shared else dispatch()
        dropout = None if travels else self._draw_dropout()
        if context.takes_outputs and context.routing.uses_router:
            self._give_outputs(x_TD, assignment, dropout)
        delta_TO = self.exchange.combine(self.bank(sent.x_MD, sent.assignment, dropout), sent)
        return y + delta_TO.view_as(y)

    def _give_outputs(self, x_TD: torch.Tensor, assignment: Assignment, dropout: Dropout | None) -> None:
        """To a loss on what the experts put out, of the input that they see."""
        assert not self.exchange.travels, "a token's experts are on several ranks"

        def summed(per_token: PerToken, mask_T: torch.Tensor | None) -> torch.Tensor:
            return self.bank.sum_apart(x_TD, assignment, dropout, per_token, mask_T)

        self.context.take_outputs(summed, self.router_index, self.stream)

    def _apply(self, fn: Any, recurse: bool = True) -> MixedLinear:
        """What was looked up holds on to the weights as they were before they are moved or cast."""
        self._served = None
        self.bank.forget()
        super()._apply(fn, recurse)
        return self

    def _draw_dropout(self) -> Dropout | None:
        return Dropout.draw(self.dropout) if self.training and self.dropout else None

    def __getattr__(self, name: str) -> Any:
        # transformers asks projections for their weight's dtype or device, and for in_features
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("weight", "bias", "in_features", "out_features", "nf"):
                return getattr(super().__getattr__("base"), name)
            raise


def _in_autocast(x_TD: torch.Tensor) -> torch.Tensor:
    """The input in the dtype that autocast gives products, where it is on: a form's two passes share one."""
    kind = x_TD.device.type
    if not torch.is_autocast_enabled(kind) or x_TD.dtype == torch.float64:
        return x_TD
    return x_TD.to(torch.get_autocast_dtype(kind))
