"""The routing context: what every mixer of a model has to know about the present forward pass.

State travels in arguments elsewhere in dsmixer. Here it can't: the mixers sit inside a transformers
model whose layers pass tensors of their own signature, so expert ids, masks and the routing mode of a
batch have no other way in, and the routers' statistics no other way out. One object a model, shared by
all its mixers, written only by the loop, by ``route_to`` and by ``load_mixture``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from dsmixer.experts.apart import PerToken
from dsmixer.experts.assignment import Assignment
from dsmixer.routing.modes import Routing, modes, topk_of_logits
from dsmixer.routing.requests import check_rows, forced_assignment, with_forced_rows
from dsmixer.routing.router import Router
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics

Prepared = TypeVar("Prepared")

# (output of one router, index of the router) -> its loss summed over real tokens, a scalar with graph
RouterLoss = Callable[[RouterOutput, int], torch.Tensor]

# (a number a token of the outputs of its experts, mask) -> its sum over a mixer's real tokens
SumApart = Callable[[PerToken, torch.Tensor | None], torch.Tensor]

# (the same with the mask known, index of the router) -> the loss of one mixer, a scalar with graph
MixerLoss = Callable[[Callable[[PerToken], torch.Tensor], int], torch.Tensor]


Stream = Literal["decoder", "encoder"]
"""Whose tokens a projection sees. A model without an encoder has one stream, the decoder's."""


@dataclass(frozen=True)
class BatchRouting:
    """What a training batch tells its mixers, of the decoder's tokens.

    Attributes:
        expert_ids_T: expert of each token in ``hard`` routing: its place in this rank's banks, -1 for none.
        mask_T: 1.0 for real tokens, 0.0 for padding.
        domains_T: domain of each token, -1 on padding; for the load of experts by domain.
        num_here: experts in this rank's banks; None: all.
        encoder: the same of the encoder's tokens, in an encoder-decoder model.
    """

    expert_ids_T: torch.Tensor | None = None
    mask_T: torch.Tensor | None = None
    domains_T: torch.Tensor | None = None
    num_here: int | None = None
    encoder: BatchRouting | None = None

    def of(self, stream: Stream) -> BatchRouting:
        """That part of it which is about a stream's tokens."""
        return self if stream == "decoder" else self.encoder or BatchRouting()


@dataclass
class _SharedAssignment:
    """The assignment of the block in work. It holds its input, so that no other can take its address, and
    what the placement made of it for all projections of the block."""

    key: tuple[object, ...]
    x: torch.Tensor
    assignment: Assignment
    prepared: Any = None


def _memory_of(x: torch.Tensor) -> tuple[object, ...]:
    """Equal for tensors that show the same memory in the same way and with the same contents."""
    version = 0 if x.is_inference() else x._version  # inference tensors have no version counter
    return x.data_ptr(), tuple(x.shape), x.stride(), version


class RoutingContext:
    """The present way to route, the batch's ids, and the statistics of the present forward pass."""

    def __init__(self, num_experts: int, routing: Routing) -> None:
        self.num_experts = num_experts
        self.routing = routing
        self.batch = BatchRouting()
        self._recording = False
        self._statistics: RoutingStatistics | None = None
        self._router_loss: RouterLoss | None = None
        self._output_loss: MixerLoss | None = None
        self._loss_sum: torch.Tensor | None = None
        self._shared: _SharedAssignment | None = None
        self._at_home: dict[Stream, Assignment] = {}

    @contextmanager
    def routed(self, routing: Routing) -> Iterator[None]:
        """Route in another way for a while."""
        before, self.routing = self.routing, routing
        try:
            yield
        finally:
            self.routing = before

    @contextmanager
    def recording(
        self,
        batch: BatchRouting,
        statistics: RoutingStatistics | None = None,
        router_loss: RouterLoss | None = None,
        output_loss: MixerLoss | None = None,
    ) -> Iterator[None]:
        """Around the forward pass of one micro-batch.

        The batch's ids stay after it, because activation checkpointing runs layers again in the backward
        pass and must see the same ones; statistics and losses are taken only inside, so each counts once.
        The losses' functions stay too: what is run again has to save the tensors that the first run saved.
        ``clear`` after the backward pass ends both.

        Args:
            batch: its ids.
            statistics: that its routers fill.
            router_loss: of each router.
            output_loss: of each mixer, on what its experts put out.
        """
        self.batch, self._statistics, self._router_loss = batch, statistics, router_loss
        self._output_loss, self._at_home = output_loss, {}
        self._loss_sum, self._recording, self._shared = None, True, None
        try:
            yield
        finally:
            self._recording, self._shared = False, None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around a pass that is no part of training, perhaps before the backward pass of one that is."""
        kept = self.batch, self._statistics, self._router_loss, self._output_loss, self._at_home
        self.clear()
        try:
            yield
        finally:
            self.batch, self._statistics, self._router_loss, self._output_loss, self._at_home = kept

    def take_loss(self) -> torch.Tensor | None:
        """The losses of the last recorded pass, summed over routers, mixers and real tokens."""
        loss, self._loss_sum = self._loss_sum, None
        return loss

    def clear(self) -> None:
        """Forget the batch and the routers' losses: the next pass is not part of training."""
        self.batch, self._shared, self._at_home = BatchRouting(), None, {}
        self._statistics = self._router_loss = self._output_loss = None

    def assign(
        self,
        router: Router,
        index: int,
        x_TD: torch.Tensor,
        *,
        shared_input: torch.Tensor | None = None,
        stream: Stream = "decoder",
        num_rows: int | None = None,
    ) -> Assignment:
        """The experts of each token of ``x_TD``, as the present routing says.

        Args:
            router: the router to ask.
            index: its row in the statistics.
            x_TD: the tokens.
            shared_input: what the projection read before it was flattened, where others of the block use
                the same router; those that read the same memory get one and the same assignment, counted
                once.
            stream: whose tokens they are.
            num_rows: of the batch that they are of; None: one token a row.
        """
        if self.routing.rows is not None:
            check_rows(self.routing.rows, len(x_TD) if num_rows is None else num_rows)
        if not self.routing.uses_router:
            return self._without_router(x_TD, stream)
        if shared_input is None:
            return self._through_router(router, index, x_TD, stream)
        key = (index, self.routing, self._recording, torch.is_grad_enabled(), *_memory_of(shared_input))
        kept = self._shared
        if kept is None or kept.key != key:
            kept = _SharedAssignment(key, shared_input, self._through_router(router, index, x_TD, stream))
            self._shared = kept
        return kept.assignment

    def once_a_block(self, assignment: Assignment, prepare: Callable[[], Prepared]) -> Prepared:
        """What ``prepare`` makes of an assignment that projections share, made once for all of them."""
        kept = self._shared
        if kept is None or kept.assignment is not assignment:
            return prepare()
        if kept.prepared is None:
            kept.prepared = prepare()
        prepared: Prepared = kept.prepared
        return prepared

    def _without_router(self, x_TD: torch.Tensor, stream: Stream) -> Assignment:
        num_tokens, mode = x_TD.shape[0], self.routing.mode
        if self.routing.rows is not None:
            return forced_assignment(self.routing.rows, num_tokens, self.num_experts, x_TD.device)
        ones_T1 = torch.ones(num_tokens, 1, device=x_TD.device)
        if mode == "uniform":
            gate_TE = ones_T1.expand(num_tokens, self.num_experts) / self.num_experts
            return Assignment(self.num_experts, gate_TE=gate_TE)
        assert mode == "hard", mode
        if self.routing.expert is not None:
            ids_T1 = torch.full((num_tokens, 1), self.routing.expert, device=x_TD.device)
            return Assignment(self.num_experts, indices_TK=ids_T1, weights_TK=ones_T1)
        batch = self.batch.of(stream)
        ids_T = batch.expert_ids_T
        assert ids_T is not None and ids_T.shape[0] == num_tokens, "hard routing without its ids"
        if stream not in self._at_home:
            here = self.num_experts if batch.num_here is None else batch.num_here
            at_home = Assignment(here, indices_TK=ids_T[:, None], weights_TK=ones_T1, here=True)
            self._at_home[stream] = at_home
        return self._at_home[stream]

    def _through_router(self, router: Router, index: int, x_TD: torch.Tensor, stream: Stream) -> Assignment:
        logits_TE = router(x_TD)
        if self.unobserved and self.routing.renormalized_topk:
            choice = topk_of_logits(logits_TE, self.routing)
        else:
            p_TE = torch.softmax(logits_TE, dim=1)
            choice = modes[self.routing.mode](p_TE, self.routing)
            batch = self.batch.of(stream)
            self._record(RouterOutput(logits_TE, p_TE, choice, batch.mask_T), index, batch.domains_T)
        if self.routing.rows is not None:
            choice = with_forced_rows(choice, self.routing.rows)
        if choice.gate_TE is not None:
            return Assignment(self.num_experts, gate_TE=choice.gate_TE)
        return Assignment(self.num_experts, indices_TK=choice.indices_TK, weights_TK=choice.weights_TK)

    @property
    def unobserved(self) -> bool:
        """Whether nobody asks for the probabilities of all experts."""
        return not self._recording and self._router_loss is None and not torch.is_grad_enabled()

    def _record(self, output: RouterOutput, index: int, domains_T: torch.Tensor | None) -> None:
        # the loss first: what it makes of the output with a graph serves the statistics too
        if self._router_loss is not None and (self._recording or torch.is_grad_enabled()):
            self._add_loss(self._router_loss(output, index))
        if self._recording and self._statistics is not None:
            self._statistics.record(index, output, domains_T)

    @property
    def takes_outputs(self) -> bool:
        """Whether a loss is taken of what experts put out."""
        return self._output_loss is not None and (self._recording or torch.is_grad_enabled())

    def take_outputs(self, summed: SumApart, index: int, stream: Stream) -> None:
        """The loss of one mixer; ``summed`` adds up a number a token, ``index`` is that of its router."""
        assert self._output_loss is not None
        mask_T = self.batch.of(stream).mask_T
        self._add_loss(self._output_loss(lambda per_token: summed(per_token, mask_T), index))

    def _add_loss(self, loss: torch.Tensor) -> None:
        # run again by activation checkpointing, only the tensors it saves are wanted
        if self._recording:
            self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
