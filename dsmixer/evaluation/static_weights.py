"""What a mixture's routers weigh its experts with on a task, and what it costs to freeze that.

Shapes: M routers, T tokens, E experts, B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dsmixer.data.collate import collate
from dsmixer.evaluation.routing_analysis import RoutingCounts, recorder
from dsmixer.evaluation.scoring import score_rows
from dsmixer.evaluation.sharing import batches_of, device_of
from dsmixer.evaluation.sheet import Sheet
from dsmixer.losses.task import IGNORED, target_losses
from dsmixer.model.inject import Mixture, mixture_of, route_to
from dsmixer.routing.constant import ConstantWeights
from dsmixer.routing.statistics import RouterOutput


class _WeightSums(RoutingCounts):
    """The weights as tokens hear them: renormalised only where the routing does so."""

    def __init__(self, mixture: Mixture, own_experts: Sequence[str], device: torch.device) -> None:
        super().__init__(mixture, own_experts, device)
        shape = (len(mixture.routers), len(mixture.expert_names))
        self.heard_ME = torch.zeros(shape, dtype=torch.float64, device=device)

    @torch.no_grad()
    def record(self, router: int, output: RouterOutput, domains_T: torch.Tensor | None) -> None:
        super().record(router, output, domains_T)
        choice = output.choice
        gate_TE = choice.gate_TE
        if gate_TE is None:
            gate_TE = torch.zeros_like(output.p_TE).scatter(1, choice.indices_TK, choice.weights_TK)
        self.heard_ME[router] += output.token_sum(gate_TE.double())


def mean_weights(
    model: nn.Module, sheet: Sheet, rows: Sequence[int], *, batch_size: int, pad_token_id: int
) -> torch.Tensor:
    """The mean weight of each expert at each router over the real tokens of some rows, ``[M, E]`` float32.

    Args:
        model: with mixers, in evaluation mode, routed by its routers; one process.
        rows: prompts and right completions; wrong choices are passed over.
    """
    mixture = mixture_of(model)
    sums = _WeightSums(mixture, sheet.own_experts, device_of(model))
    score_rows(
        model,
        sheet,
        [row for row in rows if sheet.is_target_row[row]],
        batch_size=batch_size,
        pad_token_id=pad_token_id,
        end_token_id=None,
        around=recorder(mixture, sheet, sums),
    )
    return (sums.heard_ME / sums.tokens_M.double().clamp_min(1)[:, None]).float().cpu()


@contextmanager
def weighed(model: nn.Module, weights_ME: torch.Tensor) -> Iterator[None]:
    """Give every token the same weights for a while, those of its projection's router."""
    mixture, context = mixture_of(model), ConstantWeights(weights_ME)
    before = {path: mixer._outside for path, mixer in mixture.mixers.items()}
    try:
        for mixer in mixture.mixers.values():
            mixer._outside = (context, mixer._outside[1])
        yield
    finally:
        for path, mixer in mixture.mixers.items():
            mixer._outside = before[path]


@dataclass(frozen=True)
class Gap:
    """Held-out figures of a static merge.

    Attributes:
        losses: nats a target token: ``base``, ``mixture``, and each merge by its name.
        differences: of each merge, the mean over target tokens of the length of what its logits differ by
            from the mixture's, as a share of the length of the mixture's.
        num_targets: target tokens that were scored.
    """

    losses: dict[str, float]
    differences: dict[str, float]
    num_targets: int


@torch.no_grad()
def measure_gap(
    model: nn.Module,
    sheet: Sheet,
    rows: Sequence[int],
    merges: Mapping[str, torch.Tensor],
    *,
    batch_size: int,
    pad_token_id: int,
) -> Gap:
    """Compare static merges with the routed mixture and the base, on the same rows.

    Args:
        model: with mixers, in evaluation mode, routed by its routers; one process.
        rows: wrong choices are passed over.
        merges: weights ``[M, E]`` by a name.
    """
    losses = dict.fromkeys(("base", "mixture", *merges), 0.0)
    differences = dict.fromkeys(merges, 0.0)
    num_targets = 0
    rows = [row for row in rows if sheet.is_target_row[row]]
    for batch in batches_of(rows, sheet.store.lengths.tolist(), batch_size):
        micro = collate(sheet.store, [(row,) for row in batch], pad_token_id).to(device_of(model))
        given = micro.inputs()
        given.pop("position_ids", None)  # a row is one example here
        target = micro.targets != IGNORED
        num_targets += int(target.sum())

        def logits() -> torch.Tensor:
            found: torch.Tensor = model(**given, use_cache=False).logits  # noqa: B023
            return found

        def loss_of(logits_BSV: torch.Tensor) -> float:
            return float(target_losses(logits_BSV, micro.targets).double().sum())  # noqa: B023

        with route_to(model, None):
            losses["base"] += loss_of(logits())
        routed = logits()
        losses["mixture"] += loss_of(routed)
        routed_NV = routed[target].float()
        for name, weights_ME in merges.items():
            with weighed(model, weights_ME):
                merged = logits()
            losses[name] += loss_of(merged)
            apart_N = (merged[target].float() - routed_NV).norm(dim=1) / routed_NV.norm(dim=1)
            differences[name] += float(apart_N.double().sum())
    return Gap(
        {name: value / max(1, num_targets) for name, value in losses.items()},
        {name: value / max(1, num_targets) for name, value in differences.items()},
        num_targets,
    )
