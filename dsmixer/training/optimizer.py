"""AdamW that treats every expert as if it trained alone, over DeepSpeed's flat partitions.

Clipping, idle experts and Adam's step count are per expert; the learning rate is the step's. With one
expert it is ``torch.optim.AdamW`` after ``clip_grad_norm_``.

A unit is what is clipped and counted together: each expert, over all its projections, and all routers as
one. U units: E experts, then the routers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsmixer.losses.preserve import preserve_term
from dsmixer.placement.groups import Piece, Shard, is_bank
from dsmixer.placement.layout import ExpertLayout


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

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.start : self.start + self.count * self.width].view(self.count, self.width)

    def select(self, values_U: torch.Tensor) -> torch.Tensor:
        """The rows' entries of a tensor over units, without copying where units follow each other."""
        first, last = self.units[0], self.units[-1]
        if last - first + 1 == self.count:
            return values_U[first : last + 1]
        return values_U[torch.tensor(self.units, device=values_U.device)]


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


class ExpertAdamW(torch.optim.Optimizer):
    """See the module. DeepSpeed makes its partitions from ``params``; ``bind`` then tells what they hold,
    ``prepare`` looks at a step's gradients as a whole, and ``step`` updates one partition at a time, as
    DeepSpeed calls it."""

    def __init__(self, params: Iterable[Any], layout: ExpertLayout, settings: AdamSettings) -> None:
        super().__init__(params, {"lr": 0.0})
        self.layout, self.settings = layout, settings
        self.num_units = layout.num_experts + 1
        self.steps = torch.zeros(self.num_units, dtype=torch.int64)
        self.origin: list[torch.Tensor] | None = None
        self._shards: list[Shard] = []
        self._index: dict[int, int] = {}
        self._spans: list[list[_Span]] = []
        self._plan: StepPlan | None = None
        self._clip: torch.Tensor | None = None

    def bind(self, shards: Sequence[Shard]) -> None:
        """Learn the partitions and make their moments."""
        self._shards = list(shards)
        self._index = {id(shard.weights): i for i, shard in enumerate(shards)}
        self._spans = [
            [span for piece in shard.pieces for span in spans_of(piece, self.layout)] for shard in shards
        ]
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
        value = torch.zeros((), device=self._device())
        if self.origin is None or plan.preserve_beta is None:
            return value
        beta_U = (plan.preserve_beta * plan.reached).to(value.device)
        for i, (shard, piece_grads) in enumerate(zip(self._shards, grads, strict=True)):
            for piece, grad in zip(shard.pieces, piece_grads, strict=True):
                for span in spans_of(piece, self.layout):
                    pull, term = preserve_term(
                        span.of(shard.flat()), span.of(self.origin[i]), span.select(beta_U)[:, None]
                    )
                    span_at = span.start - piece.flat_start
                    grad[span_at : span_at + pull.numel()].view_as(pull).add_(pull)
                    value += term
        return value

    @torch.no_grad()
    def squared_norms(self, grads: list[list[torch.Tensor]]) -> torch.Tensor:
        """Squared gradient norm of each unit over this rank's shards, ``[U]`` float32."""
        norms_U = torch.zeros(self.num_units, device=self._device())
        for shard, piece_grads in zip(self._shards, grads, strict=True):
            for piece, grad in zip(shard.pieces, piece_grads, strict=True):
                for span in spans_of(piece, self.layout):
                    at = span.start - piece.flat_start
                    rows = grad[at : at + span.count * span.width].view(span.count, span.width)
                    units = torch.tensor(span.units, device=norms_U.device)
                    norms_U.index_add_(0, units, rows.float().square().sum(1))
        return norms_U

    def prepare(self, plan: StepPlan, squared_norms_U: torch.Tensor) -> None:
        """Fix the step: ``squared_norms_U`` summed over all partitions."""
        self._plan = plan
        self.steps += plan.reached
        clip = self.settings.clip
        norms_U = squared_norms_U.sqrt()
        self._clip = torch.ones_like(norms_U) if clip is None else (clip / (norms_U + 1e-6)).clamp(max=1.0)
        for group in self.param_groups:
            group["lr"] = plan.learning_rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the partitions that DeepSpeed has put into ``param_groups``."""
        assert self._plan is not None, "prepare the step first"
        for group in self.param_groups:
            for weights in group["params"]:
                self._update(self._index[id(weights)], weights.grad.view(-1))

    def _update(self, index: int, grad: torch.Tensor) -> None:
        flat = self._shards[index].flat()
        factors = self._unit_factors()
        for span in self._spans[index]:
            active = [i for i, unit in enumerate(span.units) if factors.reached[unit]]
            if not active:
                continue
            tensors = [
                span.of(t)
                for t in (flat, grad, self.moment("exp_avg", index), self.moment("exp_avg_sq", index))
            ]
            coefficients = span.select(factors.table)
            if len(active) == span.count:
                self._adamw(tensors, coefficients)
            else:
                self._adamw_rows(tensors, coefficients, active)

    def _adamw_rows(self, tensors: list[torch.Tensor], coefficients: torch.Tensor, active: list[int]) -> None:
        """Only the active rows: the cost follows the chosen experts, not the pool."""
        rows = torch.tensor(active, device=coefficients.device)
        picked = [tensor[rows] for tensor in tensors]
        self._adamw(picked, coefficients[rows])
        for whole, part in ((tensors[i], picked[i]) for i in (0, 2, 3)):
            whole.index_copy_(0, rows, part)

    def _adamw(self, tensors: list[torch.Tensor], coefficients: torch.Tensor) -> None:
        """torch.optim.AdamW's arithmetic, with a row's own clip, rate and bias corrections."""
        weights, grad, exp_avg, exp_avg_sq = tensors
        clip, rate, correction, root_correction = coefficients.unsqueeze(-1).unbind(1)
        beta1, beta2 = self.settings.betas
        grad = grad * clip
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if self.settings.weight_decay:
            weights.mul_(1 - rate * self.settings.weight_decay)
        denominator = (exp_avg_sq.sqrt() / root_correction).add_(self.settings.eps)
        weights.sub_(rate / correction * (exp_avg / denominator))

    def _unit_factors(self) -> _Factors:
        assert self._plan is not None and self._clip is not None
        beta1, beta2 = self.settings.betas
        steps = self.steps.clamp_min(1).double()
        rates = torch.full((self.num_units,), self._plan.learning_rate, dtype=torch.float64)
        rates[-1] = self._plan.router_learning_rate
        host = torch.stack((rates, 1 - beta1**steps, (1 - beta2**steps).sqrt()), dim=1).float()
        table = torch.cat((self._clip[:, None], host.to(self._clip.device)), dim=1)
        return _Factors(self._plan.reached.tolist(), table)

    def _device(self) -> torch.device:
        return self._shards[0].weights.device


@dataclass(frozen=True)
class _Factors:
    """``table [U, 4]``: clip coefficient, learning rate, first and root of second bias correction."""

    reached: list[bool]
    table: torch.Tensor
