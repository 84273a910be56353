"""AdamW that treats every expert as if it trained alone, over DeepSpeed's flat partitions.

Clipping, idle experts and Adam's step count are per expert; the learning rate is the step's. With one
expert it is ``torch.optim.AdamW`` after ``clip_grad_norm_``.

A unit is what is clipped and counted together: each expert, over all its projections, and all routers as
one. U units: E experts, then the routers.

A step looks at the units that it reached and at no other, so that its arithmetic follows the chosen experts
and not the pool: an expert that no token reached has a gradient of zero, and is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dsmixer.losses.preserve import preserve_term
from dsmixer.placement.layout import ExpertLayout
from dsmixer.placement.pieces import Shard
from dsmixer.training.moments import KINDS, Keep, Moments, StackMoments
from dsmixer.training.rows import Reached, Rows, Span, Stack, reached_rows, spans_of, stacked

AT_ONCE = 2**20  # elements that one update makes temporary tensors of, unless a single span has more


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


@dataclass(frozen=True)
class _Coefficients:
    """Of the reached rows of a span, ``[N, 1]`` each: clip coefficient, learning rate, rate over the first
    bias correction, root of the second."""

    clip: torch.Tensor
    rate: torch.Tensor
    step_size: torch.Tensor
    root_correction: torch.Tensor


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
        self._coefficients: dict[tuple[int, ...], list[_Coefficients]] | None = None

    def bind(self, shards: Sequence[Shard]) -> None:
        """Learn the partitions and make their moments."""
        self._shards = list(shards)
        self._index = {id(shard.weights): i for i, shard in enumerate(shards)}
        rows = self.settings.router_rows
        self._spans = [[spans_of(piece, self.layout, rows) for piece in shard.pieces] for shard in shards]
        self._stacks = [stacked(span for spans in pieces for span in spans) for pieces in self._spans]
        different = {span.units for pieces in self._spans for spans in pieces for span in spans}
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
    def add_preserve(self, grads: list[list[torch.Tensor]], plan: StepPlan) -> torch.Tensor:
        """Add the preserve term's gradient in place; returns its value over this rank's shards."""
        values_U = torch.zeros(self.num_units, device=self._device())
        if self.origin is None or plan.preserve_beta is None:
            return values_U.sum()
        beta_U = plan.preserve_beta.to(values_U.device)
        for index, span, rows, grad_XY in self._reached_spans(grads, plan):
            weights = rows.of(span.of(self._shards[index].flat()))
            origin = rows.of(span.of(self.origin[index])).to(weights.device)
            pull, values = preserve_term(weights, origin, beta_U[rows.units][:, None])
            rows.add(grad_XY, pull)
            rows.add_units(values_U, values)
        return (values_U * self.counted_U).sum()

    @torch.no_grad()
    def squared_norms(self, grads: list[list[torch.Tensor]], plan: StepPlan) -> torch.Tensor:
        """Squared gradient norm of each unit over this rank's shards, ``[U]`` float32; 0 for units that the
        step did not reach."""
        norms_U = torch.zeros(self.num_units, device=self._device())
        for _, span, rows, grad_XY in self._reached_spans(grads, plan):
            self._add_squares(span, norms_U, rows, grad_XY)
        return norms_U * self.counted_U

    def _add_squares(self, span: Span, norms_U: torch.Tensor, rows: Rows, grad_XY: torch.Tensor) -> None:
        rows.add_units(norms_U, rows.of(grad_XY).float().square().sum(1))

    def _reached_spans(
        self, grads: list[list[torch.Tensor]], plan: StepPlan
    ) -> Iterator[tuple[int, Span, Rows, torch.Tensor]]:
        """Index of the shard, span, its reached rows, and its gradient ``[rows, width]``."""
        self._look_at(plan)
        for index, (shard, piece_grads) in enumerate(zip(self._shards, grads, strict=True)):
            for piece, spans, grad in zip(shard.pieces, self._spans[index], piece_grads, strict=True):
                for span in spans:
                    reached = self._reached[span.units]
                    if reached is not None:
                        yield index, span, reached.rows, span.of(grad, begins=piece.flat_start)

    def _look_at(self, plan: StepPlan) -> None:
        """Find the reached rows of all spans, once a step; spans of the same units share them."""
        if self._plan is plan:
            return
        self._plan, device = plan, self._device()
        self._reached = {
            units: reached_rows(units_X, plan.reached, device) for units, units_X in self._units.items()
        }

    def prepare(self, plan: StepPlan, squared_norms_U: torch.Tensor) -> None:
        """Fix the step: ``squared_norms_U`` summed over all partitions."""
        self._look_at(plan)
        self.steps += plan.reached
        clip = self.settings.clip
        norms_U = squared_norms_U.sqrt()
        clip_U = torch.ones_like(norms_U) if clip is None else (clip / (norms_U + 1e-6)).clamp(max=1.0)
        table_U4 = torch.cat((clip_U[:, None], self._rates(plan).to(clip_U.device)), dim=1)
        self._coefficients = {
            units: [_Coefficients(*table_U4[part.units].unsqueeze(-1).unbind(1)) for part in reached.parts]
            for units, reached in self._reached.items()
            if reached is not None
        }
        for group in self.param_groups:
            group["lr"] = plan.learning_rate

    def _rates(self, plan: StepPlan) -> torch.Tensor:
        """The last three of ``_Coefficients`` for each unit, ``[U, 3]`` float32."""
        beta1, beta2 = self.settings.betas
        steps = self.steps.clamp_min(1).double()
        rates = torch.full((self.num_units,), plan.learning_rate, dtype=torch.float64)
        rates[-1] = plan.router_learning_rate
        return torch.stack((rates, rates / (1 - beta1**steps), (1 - beta2**steps).sqrt()), dim=1).float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the partitions that DeepSpeed has put into ``param_groups``."""
        assert self._coefficients is not None, "prepare the step first"
        for group in self.param_groups:
            for weights in group["params"]:
                index, grad = self._index[id(weights)], weights.grad.view(-1)
                flats = (self._shards[index].flat(), grad)
                for number, stack in enumerate(self._stacks[index]):
                    self._update(stack.span, stack, flats, self.moments.of(index, number))

    def _update(
        self, span: Span, stack: Stack, flats: tuple[torch.Tensor, ...], moments: list[StackMoments]
    ) -> None:
        """The reached rows of a stack, and no others, from weights and gradient of a shard."""
        reached = self._reached[span.units]
        if reached is None:
            return
        assert self._coefficients is not None
        whole = [stack.of(flat) for flat in flats]
        for rows, own in zip(reached.parts, self._coefficients[span.units], strict=True):
            at_once = max(1, AT_ONCE // (rows.count * span.width))
            for first in range(0, stack.repeats, at_once):
                part = slice(first, first + at_once)
                weights, grad = (rows.of(tensor[part]) for tensor in whole)
                taken = [moment.take(rows, part) for moment in moments]
                self._adamw([weights, grad, *taken], own)
                rows.put(whole[0][part], weights)
                for moment, values in zip(moments, taken, strict=True):
                    moment.put(rows, part, values)

    def _adamw(self, tensors: list[torch.Tensor], own: _Coefficients) -> None:
        """torch.optim.AdamW's arithmetic, with a row's own clip, rate and bias corrections."""
        weights, grad, exp_avg, exp_avg_sq = tensors
        beta1, beta2 = self.settings.betas
        grad = grad * own.clip
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if self.settings.weight_decay:
            weights.mul_(1 - own.rate * self.settings.weight_decay)
        denominator = (exp_avg_sq.sqrt() / own.root_correction).add_(self.settings.eps)
        weights.sub_(own.step_size * (exp_avg / denominator))

    def _device(self) -> torch.device:
        return self._shards[0].weights.device
