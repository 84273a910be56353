"""AdamW that treats every expert as if it trained alone, over DeepSpeed's flat partitions.

Clipping, idle experts and Adam's step count are per expert; the learning rate is the step's. With one
expert it is ``torch.optim.AdamW`` after ``clip_grad_norm_``.

A unit is what is clipped and counted together: each expert, over all its projections, and all routers as
one. U units: E experts, then the routers.

A step looks at the units that it reached and at no other, so that its arithmetic follows the chosen experts
and not the pool: an expert that no token reached has a gradient of zero, and is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsmixer.losses.preserve import preserve_term
from dsmixer.placement.layout import ExpertLayout
from dsmixer.placement.pieces import Piece, Shard, is_bank

FEW_RUNS = 5  # fewer runs of rows than this are updated in place, one after the other
AT_ONCE = 2**20  # elements that one update makes temporary tensors of, unless a single span has more


@dataclass(frozen=True)
class AdamSettings:
    """Betas, eps and decoupled weight decay as in ``torch.optim.AdamW``; ``clip`` bounds the gradient norm
    of each unit (None: no clipping)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0


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
class _Span:
    """Rows of one parameter in a shard: ``count`` rows of ``width`` elements, one unit each.

    The routers' span has one row. A partition may start or end inside an expert: that part is a row of
    its own.
    """

    start: int
    count: int
    width: int
    units: tuple[int, ...]

    def of(self, flat: torch.Tensor, begins: int = 0) -> torch.Tensor:
        """The rows ``[count, width]`` in a tensor that begins at that element of the shard."""
        start = self.start - begins
        return flat[start : start + self.count * self.width].view(self.count, self.width)


@dataclass(frozen=True)
class _Coefficients:
    """Of the reached rows of a span, ``[N, 1]`` each: clip coefficient, learning rate, rate over the first
    bias correction, root of the second."""

    clip: torch.Tensor
    rate: torch.Tensor
    step_size: torch.Tensor
    root_correction: torch.Tensor


@dataclass(frozen=True)
class _Rows:
    """The N rows of a span that a step reached, and their units.

    Rows that follow each other are taken as a view; others are copied out, and back in.
    """

    places: slice | torch.Tensor
    units: slice | torch.Tensor
    count: int

    def of(self, span: torch.Tensor) -> torch.Tensor:
        """``[..., count, width]`` to ``[..., N, width]``."""
        if isinstance(self.places, torch.Tensor):
            return span.index_select(-2, self.places)
        return span[..., self.places, :]

    def put(self, span: torch.Tensor, rows: torch.Tensor) -> None:
        """Write back what ``of`` copied out."""
        if isinstance(self.places, torch.Tensor):
            span.index_copy_(-2, self.places, rows)

    def add(self, span: torch.Tensor, rows: torch.Tensor) -> None:
        if isinstance(self.places, torch.Tensor):
            span.index_add_(-2, self.places, rows)
        else:
            span[..., self.places, :].add_(rows)

    def add_units(self, values_U: torch.Tensor, values_N: torch.Tensor) -> None:
        """Add a value of each row to that of its unit."""
        if isinstance(self.units, torch.Tensor):
            values_U.index_add_(0, self.units, values_N)
        else:
            values_U[self.units].add_(values_N)


@dataclass(frozen=True)
class _Reached:
    """The rows that a step reached, together, and as the parts in which they are updated: their runs where
    those are few, which needs no copy."""

    rows: _Rows
    parts: tuple[_Rows, ...]


def _reached_rows(units_X: torch.Tensor, reached_U: torch.Tensor, device: torch.device) -> _Reached | None:
    """Which rows of a span of these units a step reached; None where it reached none."""
    places_N = reached_U[units_X].nonzero().flatten()
    if not len(places_N):
        return None

    def rows(places: torch.Tensor) -> _Rows:
        return _Rows(_run_or_index(places, device), _run_or_index(units_X[places], device), len(places))

    together = rows(places_N)
    cuts = (places_N.diff() != 1).nonzero().flatten() + 1
    few = 0 < len(cuts) < FEW_RUNS
    return _Reached(together, tuple(map(rows, places_N.tensor_split(cuts))) if few else (together,))


def _run_or_index(indices: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    """A slice where the indices follow each other, else the indices on the device."""
    first = int(indices[0])
    if torch.equal(indices, torch.arange(first, first + len(indices))):
        return slice(first, first + len(indices))
    return indices.to(device)


def spans_of(piece: Piece, layout: ExpertLayout) -> list[_Span]:
    """Cut a piece of a bank ``[e, ...]`` at its experts; a router ``[E, D]`` is one row of the last unit."""
    if not is_bank(piece.name):
        return [_Span(piece.flat_start, 1, piece.numel, (layout.num_experts,))]
    width = math.prod(piece.shape[1:])
    spans, position, left = [], piece.param_start, piece.numel
    start = piece.flat_start
    while left:
        place, inside = divmod(position, width)
        count, length = (1, min(width - inside, left)) if inside or left < width else (left // width, width)
        spans.append(_Span(start, count, length, layout.local[place : place + count]))
        start, position, left = start + count * length, position + count * length, left - count * length
    return spans


@dataclass(frozen=True)
class _Stack:
    """Spans of the same units and width that follow each other in a shard: they are updated together."""

    span: _Span
    repeats: int

    @property
    def end(self) -> int:
        return self.span.start + self.repeats * self.span.count * self.span.width

    def goes_on(self, span: _Span) -> bool:
        """Whether a span is one more of the same kind, right behind."""
        return span == replace(self.span, start=self.end)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """``[repeats, count, width]``."""
        return flat[self.span.start : self.end].view(self.repeats, self.span.count, self.span.width)


def _stacked(spans: Iterable[_Span]) -> list[_Stack]:
    stacks: list[_Stack] = []
    for span in spans:
        last = stacks[-1] if stacks else None
        if last is not None and last.goes_on(span):
            stacks[-1] = _Stack(last.span, last.repeats + 1)
        else:
            stacks.append(_Stack(span, 1))
    return stacks


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
        self._spans: list[list[list[_Span]]] = []
        self._plan: StepPlan | None = None
        self._stacks: list[list[_Stack]] = []
        self._units: dict[tuple[int, ...], torch.Tensor] = {}
        self._reached: dict[tuple[int, ...], _Reached | None] = {}
        self._coefficients: dict[tuple[int, ...], list[_Coefficients]] | None = None

    def bind(self, shards: Sequence[Shard]) -> None:
        """Learn the partitions and make their moments."""
        self._shards = list(shards)
        self._index = {id(shard.weights): i for i, shard in enumerate(shards)}
        self._spans = [[spans_of(piece, self.layout) for piece in shard.pieces] for shard in shards]
        self._stacks = [_stacked(span for spans in pieces for span in spans) for pieces in self._spans]
        different = {span.units for pieces in self._spans for spans in pieces for span in spans}
        self._units = {units: torch.tensor(units) for units in different}
        self._plan = None
        self.counted_U = self.counted_U.to(self._device())
        for shard in shards:
            for key in ("exp_avg", "exp_avg_sq"):
                self.state[shard.weights][key] = torch.zeros_like(shard.flat())

    def moment(self, key: str, index: int) -> torch.Tensor:
        """``exp_avg`` or ``exp_avg_sq`` of a shard, flat."""
        moment: torch.Tensor = self.state[self._shards[index].weights][key]
        return moment

    def hold_origin(self) -> None:
        """Keep theta(0) of the preserve term: the weights as they are now, partitioned like them."""
        self.origin = [shard.flat().clone() for shard in self._shards]

    @torch.no_grad()
    def add_preserve(self, grads: list[list[torch.Tensor]], plan: StepPlan) -> torch.Tensor:
        """Add the preserve term's gradient in place; returns its value over this rank's shards."""
        values_U = torch.zeros(self.num_units, device=self._device())
        if self.origin is None or plan.preserve_beta is None:
            return values_U.sum()
        beta_U = plan.preserve_beta.to(values_U.device)
        for index, span, rows, grad_XY in self._reached_spans(grads, plan):
            weights = rows.of(span.of(self._shards[index].flat()))
            origin = rows.of(span.of(self.origin[index]))
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

    def _add_squares(self, span: _Span, norms_U: torch.Tensor, rows: _Rows, grad_XY: torch.Tensor) -> None:
        rows.add_units(norms_U, rows.of(grad_XY).float().square().sum(1))

    def _reached_spans(
        self, grads: list[list[torch.Tensor]], plan: StepPlan
    ) -> Iterator[tuple[int, _Span, _Rows, torch.Tensor]]:
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
            units: _reached_rows(units_X, plan.reached, device) for units, units_X in self._units.items()
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
                flats = (
                    self._shards[index].flat(),
                    grad,
                    self.moment("exp_avg", index),
                    self.moment("exp_avg_sq", index),
                )
                for stack in self._stacks[index]:
                    self._update(stack.span, stack, flats)

    def _update(self, span: _Span, stack: _Stack, flats: tuple[torch.Tensor, ...]) -> None:
        """The reached rows of a stack, and no others: weights, gradient and the two moments of a shard."""
        reached = self._reached[span.units]
        if reached is None:
            return
        assert self._coefficients is not None
        whole = [stack.of(flat) for flat in flats]
        for rows, own in zip(reached.parts, self._coefficients[span.units], strict=True):
            at_once = max(1, AT_ONCE // (rows.count * span.width))
            for first in range(0, stack.repeats, at_once):
                some = [tensor[first : first + at_once] for tensor in whole]
                picked = [rows.of(tensor) for tensor in some]
                self._adamw(picked, own)
                for i in (0, 2, 3):
                    rows.put(some[i], picked[i])

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
