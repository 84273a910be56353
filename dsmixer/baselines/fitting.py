"""The one training loop of methods that train: AdamW on a few weights, one process, the base frozen.

Shapes: B rows, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from dsmixer.baselines.rows import TrainingRows
from dsmixer.data.collate import PADDING, MicroBatch, collate
from dsmixer.data.seeds import generator
from dsmixer.evaluation.sharing import device_of
from dsmixer.losses.interface import RoutingLoss
from dsmixer.losses.task import target_losses
from dsmixer.losses.usage import micro_batch_usage
from dsmixer.routing.context import Stream
from dsmixer.routing.modes import Choice
from dsmixer.routing.statistics import RouterOutput
from dsmixer.training.schedule import rate_share


@dataclass(frozen=True)
class Fit:
    """How a method trains.

    Attributes:
        steps: optimizer steps; None: one pass over the rows.
        batch_size: rows a step, drawn without replacement until all have been seen, then again.
        learning_rate: AdamW's peak.
        warmup_ratio: share of the steps that warm up.
        scheduler: ``constant``, ``linear`` or ``cosine`` after that.
        weight_decay: AdamW's.
        clip: largest norm of the gradient; None: as it is.
    """

    steps: int | None
    batch_size: int
    learning_rate: float
    warmup_ratio: float = 0.0
    scheduler: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    clip: float | None = None

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps on so many rows."""
        return -(-num_rows // self.batch_size) if self.steps is None else self.steps


@dataclass
class GateLoss:
    """A loss of ``dsmixer.losses`` on all gates of a forward pass, a mean over gates and real tokens.

    The loss is taken at the usage of the micro-batch itself, pooled over the gates where the loss wants
    that: value and gradient are those of the published formula on the micro-batch.

    Attributes:
        loss: on one gate.
        outputs: of the gates, in the present forward pass.
        masks: 1 for real tokens, by stream.
    """

    loss: RoutingLoss
    outputs: list[RouterOutput] = field(default_factory=list)
    masks: dict[Stream, torch.Tensor] | None = None

    def begin(self, micro: MicroBatch) -> None:
        """Before a forward pass of training."""
        self.outputs = []
        self.masks = {"decoder": _real(micro.domain_ids)}
        if micro.encoder is not None:
            self.masks["encoder"] = _real(micro.encoder.domain_ids)

    def record(self, logits_TE: torch.Tensor, p_TE: torch.Tensor, choice: Choice, stream: Stream) -> None:
        """One gate's work; outside training nothing is kept."""
        if self.masks is not None:
            self.outputs.append(RouterOutput(logits_TE, p_TE, choice, self.masks[stream]))

    def take(self) -> torch.Tensor:
        """The loss of the pass, a scalar with graph."""
        assert self.outputs, "no gate was recorded"
        usages_ME = torch.stack([self._usage(output) for output in self.outputs])
        if self.loss.pooled:
            usages_ME = usages_ME.mean(0, keepdim=True).expand_as(usages_ME)
        sums = [
            self.loss(output, usage_E, 1.0) / output.token_sum(torch.ones_like(output.p_TE[:, 0]))
            for output, usage_E in zip(self.outputs, usages_ME, strict=True)
        ]
        self.outputs, self.masks = [], None
        return torch.stack(sums).mean()

    def _usage(self, output: RouterOutput) -> torch.Tensor:
        return micro_batch_usage(output, self.loss.usage, self.loss.smooth_temperature)


def _real(domain_ids_BS: torch.Tensor) -> torch.Tensor:
    return (domain_ids_BS != PADDING).flatten().float()


def fit(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    training: TrainingRows,
    rows: Sequence[int],
    how: Fit,
    *,
    seed: int,
    purpose: str,
    gate_loss: GateLoss | None = None,
) -> list[float]:
    """Train ``parameters`` on the mean loss of a batch's target tokens, nats, with the model as it is now.

    The model is in evaluation mode meanwhile, nothing is dropped, so that the seed decides all; and frozen,
    its experts too.

    Args:
        model: under the context in which ``parameters`` act.
        parameters: what trains.
        training: the rows.
        rows: which of them.
        seed: with ``purpose``, of the order of the rows.
        gate_loss: a loss on gates, added to the task's.

    Returns:
        the task's loss of each step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=how.weight_decay)
    losses, num_steps = [], how.num_steps(len(rows))
    with at_rest(model):
        for step, batch in enumerate(_batches(rows, how, seed, purpose)):
            micro = collate(training.store, [(row,) for row in batch], training.pad_token_id)
            task, total = _losses(model, micro.to(device_of(model)), gate_loss)
            total.backward()
            if how.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, how.clip)
            share = rate_share(step, num_steps, how.warmup_ratio, how.scheduler)
            optimizer.param_groups[0]["lr"] = how.learning_rate * share
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(task.detach()))
    return losses


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Under it nothing of the model trains and nothing is dropped."""
    was_training, training = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in training:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        model.train(was_training)
        for parameter in training:
            parameter.requires_grad_(True)


def _batches(rows: Sequence[int], how: Fit, seed: int, purpose: str) -> Iterator[list[int]]:
    random, waiting = generator(seed, "baselines", purpose), list[int]()
    for _ in range(how.num_steps(len(rows))):
        while len(waiting) < min(how.batch_size, len(rows)):
            waiting += [rows[i] for i in random.permutation(len(rows))]
        yield waiting[: how.batch_size]
        waiting = waiting[how.batch_size :]


def mean_loss(model: nn.Module, micro: MicroBatch) -> torch.Tensor:
    """The mean loss of a batch's target tokens, nats, a scalar."""
    given = micro.inputs()
    given.pop("position_ids", None)  # a row is one example here, and not every model takes them
    logits_BSV = model(**given, use_cache=False).logits
    return target_losses(logits_BSV, micro.targets).sum() / micro.num_targets


def _losses(
    model: nn.Module, micro: MicroBatch, gate_loss: GateLoss | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if gate_loss is None:
        task = mean_loss(model, micro)
        return task, task
    gate_loss.begin(micro)
    task = mean_loss(model, micro)
    return task, task + gate_loss.take()


def trained(tensor: torch.Tensor) -> nn.Parameter:
    """A weight that trains, float32."""
    return nn.Parameter(tensor.detach().to(torch.float32).clone())


def count(parameters: Sequence[nn.Parameter]) -> int:
    """Their weights."""
    return sum(parameter.numel() for parameter in parameters)
