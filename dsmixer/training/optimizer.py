"""AdamW that treats every expert as if it trained alone, over DeepSpeed's flat partitions.

Clipping, idle experts and Adam's step count are per expert; the learning rate is the step's. With one
expert it is ``torch.optim.AdamW`` after ``clip_grad_norm_``.

A unit is what is clipped and counted together: each expert, over all its projections, and all routers as
one. U units: E experts, then the routers.

A step looks at the units that it reached and at no other, so that its arithmetic follows the chosen experts
and not the pool: an expert that no token reached has a gradient of zero, and is left as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dsmixer.placement.layout import ExpertLayout
from dsmixer.placement.pieces import Shard
from dsmixer.training.hold import hold_rows
from dsmixer.training.moments import KINDS, EightBitMoment, Float32Moment, Keep, Moments, StackMoment
from dsmixer.training.rows import (
    Reached,
    Rows,
    Span,
    Stack,
    reached_rows,
    spans_of,
    stacked,
    to_device,
)
from dsmixer.training.updates import Run, StepOfUnits, Updates

AT_ONCE = 2**20
"""Elements of a stack whose moments are decoded at a time, unless a single span has more."""


@dataclass(frozen=True)
class AdamSettings:
    """Betas, eps and decoupled weight decay as in ``torch.optim.AdamW``; ``clip`` bounds the gradient norm
    of each unit (None: no clipping); ``keep`` says how the moments are kept, ``origin_on_host`` where
    theta(0) of the preserve term is, ``router_rows`` the experts whose rows of the routers train (None: all).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    keep: Keep = field(default_factory=Keep)
    origin_on_host: bool = False
    router_rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step does, known before it.

    Attributes:
        learning_rate: of the experts.
        router_learning_rate: of the routers.
        reached: units that a real token reached, ``[U]`` bool on the CPU; the others are left as they are.
        preserve_beta: beta of each unit, ``[U]`` float32 on the CPU, or None.
    """

    learning_rate: float
    router_learning_rate: float
    reached: torch.Tensor
    preserve_beta: torch.Tensor | None = None


class ExpertAdamW(torch.optim.Optimizer):
    """See the module. DeepSpeed makes its partitions from ``params``; ``bind`` then tells what they hold,
    ``prepare`` looks at a step's gradients as a whole, and ``step`` updates one partition at a time, as
    DeepSpeed calls it."""

    def __init__(self, params: Iterable[Any], layout: ExpertLayout, settings: AdamSettings) -> None:
        super().__init__(params, {"lr": 0.0})
        self.layout, self.settings = layout, settings
        self.num_units = layout.num_experts + 1
        self.steps = torch.zeros(self.num_units, dtype=torch.int64)
        self.counted_U = torch.ones(self.num_units)
        for expert, counted in zip(layout.local, layout.counted, strict=True):
            self.counted_U[expert] = float(counted)  # of several owners the first one speaks for an expert
        self.origin: list[torch.Tensor] | None = None
        self._shards: list[Shard] = []
        self._index: dict[int, int] = {}
        self._moments: Moments | None = None
        self._spans: list[list[list[Span]]] = []
        self._plan: StepPlan | None = None
        self._stacks: list[list[Stack]] = []
        self._units: dict[tuple[int, ...], torch.Tensor] = {}
        self._reached: dict[tuple[int, ...], Reached | None] = {}
        self._of_units: StepOfUnits | None = None

    def bind(self, shards: Sequence[Shard]) -> None:
        """Learn the partitions and make their moments."""
        self._shards = list(shards)
        self._index = {id(shard.weights): i for i, shard in enumerate(shards)}
        rows = self.settings.router_rows
        whole = [[spans_of(piece, self.layout, rows) for piece in shard.pieces] for shard in shards]
        self._stacks = [stacked(span for spans in pieces for span in spans) for pieces in whole]
        different = {span.units for pieces in whole for spans in pieces for span in spans}
        resting = (self.num_units,)
        self._spans = [
            [[span for span in spans if span.units != resting] for spans in pieces] for pieces in whole
        ]
        self._units = {units: torch.tensor(units) for units in different}
        self._plan = None
        self.counted_U = self.counted_U.to(self._device())
        self._moments = Moments(self._shards, self._stacks, self.settings.keep, self.layout.num_experts)
        if self.settings.keep.precision == "float32":  # where DeepSpeed looks for an optimizer's state
            for index, shard in enumerate(self._shards):
                for kind in KINDS:
                    self.state[shard.weights][kind] = self._moments.flat(kind, index)

    @property
    def moments(self) -> Moments:
        """Of the partitions."""
        assert self._moments is not None, "bind the optimizer first"
        return self._moments

    def hold_origin(self) -> None:
        """Keep theta(0) of the preserve term: the weights as they are now, partitioned like them."""
        self.origin = [self._kept(shard.flat()) for shard in self._shards]

    def _kept(self, flat: torch.Tensor) -> torch.Tensor:
        if not self.settings.origin_on_host or flat.device.type == "cpu":
            return flat.clone()
        return torch.empty_like(flat, device="cpu", pin_memory=True).copy_(flat)

    @torch.no_grad()
    def measure(self, grads: list[list[torch.Tensor]], plan: StepPlan) -> torch.Tensor:
        """Add the preserve term's gradient in place, and measure what there is.

        Returns:
            over this rank's shards, the squared gradient norm of each unit, 0 for units that the step did not
            reach, and last the value of the preserve term; ``[U + 1]`` float32.
        """
        norms_U = torch.zeros(self.num_units, device=self._device())
        values_U = torch.zeros_like(norms_U)
        beta_U = None
        if self.origin is not None and plan.preserve_beta is not None:
            beta_U = to_device(plan.preserve_beta, norms_U.device)
        for index, span, rows, grad_XY in self._reached_spans(grads, plan):
            grad_NX, held = rows.of(grad_XY), None
            if beta_U is not None and self.origin is not None:
                weights_NX = rows.of(span.of(self._shards[index].flat()))
                origin_NX = to_device(rows.of(span.of(self.origin[index])), grad_NX.device)
                held = (weights_NX, origin_NX, beta_U[rows.units])
            squared_norms_N, values_N = hold_rows(grad_NX, held)
            if held is not None:
                rows.put(grad_XY, grad_NX)
            rows.add_units(norms_U, squared_norms_N)
            rows.add_units(values_U, values_N)
        counted = torch.stack((norms_U, values_U)) * self.counted_U
        return torch.cat((counted[0], counted[1].sum()[None]))

    def _reached_spans(
        self, grads: list[list[torch.Tensor]], plan: StepPlan
    ) -> Iterator[tuple[int, Span, Rows, torch.Tensor]]:
        """Index of the shard, span, reached rows, and gradient of the span ``[rows, width]``."""
        self._look_at(plan)
        for index, (shard, piece_grads) in enumerate(zip(self._shards, grads, strict=True)):
            for piece, spans, grad in zip(shard.pieces, self._spans[index], piece_grads, strict=True):
                for span in spans:
                    reached = self._reached[span.units]
                    for rows in () if reached is None else reached.parts:
                        yield index, span, rows, span.of(grad, begins=piece.flat_start)

    def _look_at(self, plan: StepPlan) -> None:
        """Find the reached rows of all spans, once a step; spans of the same units share them."""
        if self._plan is plan:
            return
        self._plan, device = plan, self._device()
        self._reached = {
            units: reached_rows(units_X, plan.reached, device) for units, units_X in self._units.items()
        }

    def prepare(self, plan: StepPlan, squared_norms_U: torch.Tensor) -> None:
        """Fix the step: ``squared_norms_U`` summed over all partitions, on the host."""
        self._look_at(plan)
        self.steps += plan.reached
        clip = self.settings.clip
        norms_U = squared_norms_U.sqrt()
        clip_U = torch.ones_like(norms_U) if clip is None else (clip / (norms_U + 1e-6)).clamp(max=1.0)
        rates = [plan.learning_rate] * (self.num_units - 1) + [plan.router_learning_rate]
        counts, on_device_U = to_device(torch.stack((self.steps.float(), clip_U)), self._device())
        self._of_units = StepOfUnits(self.steps.clone(), counts, on_device_U, clip_U < 1, rates)
        for group in self.param_groups:
            group["lr"] = plan.learning_rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the partitions that DeepSpeed has put into ``param_groups``."""
        assert self._of_units is not None, "prepare the step first"
        updates: dict[float, Updates] = defaultdict(Updates)
        for group in self.param_groups:
            for weights in group["params"]:
                index, grad = self._index[id(weights)], weights.grad.view(-1)
                flats = (self._shards[index].flat(), grad)
                for number, stack in enumerate(self._stacks[index]):
                    reached = self._reached[stack.span.units]
                    if reached is not None:
                        moments = self.moments.of(index, number)
                        self._update(updates, stack, reached.rows, flats, moments)
        self._apply(updates)

    def _update(
        self,
        updates: dict[float, Updates],
        stack: Stack,
        rows: Rows,
        flats: tuple[torch.Tensor, ...],
        moments: list[StackMoment],
    ) -> None:
        """Add the reached rows of a stack to what is to be updated; where its moments are kept in another
        form, update them now, some at a time."""
        inside = [moment.values for moment in moments if isinstance(moment, Float32Moment)]
        if len(inside) == len(moments):
            self._gather(updates, stack, rows, [*map(stack.of, flats), *inside])
            return
        encoded = [moment for moment in moments if isinstance(moment, EightBitMoment)]
        at_once = max(1, AT_ONCE // (rows.count * stack.span.width))
        for first in range(0, stack.repeats, at_once):
            part = slice(first, first + at_once)
            taken = [moment.take(rows, part) for moment in encoded]
            some: dict[float, Updates] = defaultdict(Updates)
            self._gather(some, stack, rows, [stack.of(flat)[part] for flat in flats], taken)
            self._apply(some)
            for moment, values in zip(encoded, taken, strict=True):
                moment.put(rows, part, values)

    def _gather(
        self,
        updates: dict[float, Updates],
        stack: Stack,
        rows: Rows,
        whole: Sequence[torch.Tensor],
        taken: Sequence[torch.Tensor] = (),
    ) -> None:
        """Clip the reached rows of ``[X, count, width]`` tensors, and add them to what is to be updated,
        beside those that were ``taken`` out already, ``[X, N, width]``: weights, gradient and both moments,
        in this order."""
        for run in self._runs(stack.span.units, rows):
            parts = [tensor[:, run.places] for tensor in whole] + [tensor[:, run.taken] for tensor in taken]
            if run.clip_N1 is not None:
                parts[1].mul_(run.clip_N1)
            if all(part.is_contiguous() for part in parts):
                updates[run.rate].add(run.step, *parts)
            else:
                for repeats in zip(*(part.unbind(0) for part in parts), strict=True):
                    updates[run.rate].add(run.step, *repeats)

    def _runs(self, units: tuple[int, ...], rows: Rows) -> list[Run]:
        """Of the reached rows, looked for once a step; spans of the same units share them."""
        assert self._of_units is not None
        known = self._of_units.runs
        if units not in known:
            known[units] = self._of_units.runs_of(self._units[units], rows)
        return known[units]

    def _apply(self, updates: Mapping[float, Updates]) -> None:
        """torch.optim.AdamW's arithmetic with each row's own step count, in one pass over all."""
        beta1, beta2 = self.settings.betas
        for rate, to in updates.items():
            torch._fused_adamw_(
                *(to.weights, to.grads, to.exp_avgs, to.exp_avg_sqs, [], to.steps),
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=self.settings.weight_decay,
                eps=self.settings.eps,
                amsgrad=False,
                maximize=False,
            )

    def _device(self) -> torch.device:
        return self._shards[0].weights.device
