"""How much each mixer helps, or each layer's mixers together: what to keep when a mixture is pruned.

Give every mixer m a gate g_m: ``y_m = W0 x + g_m D_m(x)`` with ``D_m(x) = sum_e w_e(x) s_e B_e A_e x``. Gates
of 1 are the mixture, gates of 0 the base. ``L(g)`` is the held-out loss, the mean over domains of each one's
mean over target tokens, nats. Four scores of a unit u, one mixer or those of a layer; more is better:

    ablation      L(1 without u) - L(1)                       exact: a forward pass a unit
    first_order   - sum_{m in u} dL/dg_m (1)                  its first-order term: one pass with gradients
    path          - sum_{m in u} int_0^1 dL/dg_m (t 1) dt     NODES passes with gradients
    size          sqrt(sum_{m in u} |D_m|^2 / sum |W0 x|^2)   one forward pass, without targets

``path`` is the value of Aumann and Shapley (Values of Non-Atomic Games, 1974; integrated gradients, arXiv
1703.01365, eq. 1): it shares out what all mixers bring together. Where routing is smooth it sums over
units to ``L(0) - L(1)``; with ``topk`` the jumps where a choice changes are in no gradient. Its gradients run
through all that follows a mixer, the probabilities of later routers among it.

Shapes: B rows of a batch, S positions, T = B S tokens, D input width of a projection, O its output width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from dsmixer.config.errors import UserError
from dsmixer.data.collate import PADDING, MicroBatch, collate
from dsmixer.evaluation.mixer_gates import gated, measured, without
from dsmixer.evaluation.scoring import completion_losses, score_rows
from dsmixer.evaluation.sharing import batches_of, device_of
from dsmixer.evaluation.sheet import Sheet
from dsmixer.model.inject import Mixture, mixture_of

NODES = 4
"""Gauss-Legendre points on the line from the base to the mixture."""

Units = Mapping[str, Sequence[str]]
"""Module paths of mixers that are kept or pruned together, by the unit's name."""


def layers_of(paths: Sequence[str]) -> dict[str, list[str]]:
    """Mixers by their layer: the module path up to its first number; a path without one is a unit itself."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
        found.setdefault(".".join(parts[: number + 1]), []).append(path)
    return found


def units_of(mixture: Mixture, by: str) -> Units:
    """What is kept or pruned as a whole.

    Args:
        mixture: whose mixers they are.
        by: ``layer`` or ``mixer``.
    """
    assert by in ("layer", "mixer"), by
    return layers_of(list(mixture.mixers)) if by == "layer" else {path: [path] for path in mixture.mixers}


@dataclass(frozen=True)
class Probe:
    """A mixture and the held-out rows that its mixers are scored on.

    Attributes:
        model: a transformers model with mixers, in evaluation mode, with all experts on this process.
        sheet: the rows; of examples with choices the right one counts.
        batch_size: rows a pass.
        pad_token_id: fills rows.
        tick: called after each batch.
    """

    model: nn.Module
    sheet: Sheet
    batch_size: int
    pad_token_id: int
    tick: Callable[[], None] | None = None

    @property
    def mixture(self) -> Mixture:
        return mixture_of(self.model)

    @property
    def num_batches(self) -> int:
        """Of one pass over the rows; ``tick`` is called after each."""
        return math.ceil(len(self.rows) / self.batch_size)

    @cached_property
    def rows(self) -> list[int]:
        """Rows that count."""
        return np.flatnonzero(self.sheet.is_target_row).tolist()

    @cached_property
    def weights(self) -> np.ndarray:
        """Of a target token in the loss, by domain: 1 / (number of domains x its domain's target tokens)."""
        domains = self.sheet.store.domain_ids[self.rows]
        counts = np.bincount(domains, self.sheet.store.target_counts[self.rows])
        there = counts > 0
        found: np.ndarray = np.where(there, 1.0, 0.0) / np.maximum(counts, 1) / max(1, int(there.sum()))
        return found

    def loss(self, pruned: Sequence[str] = ()) -> float:
        """``L`` without some mixers, nats a target token."""
        with without(self.mixture, pruned):
            scores = score_rows(
                self.model,
                self.sheet,
                self.rows,
                batch_size=self.batch_size,
                pad_token_id=self.pad_token_id,
                end_token_id=None,
                tick=self.tick,
            )
        weights = self.weights[self.sheet.store.domain_ids[self.rows]]
        return float((scores.nll[self.rows] * weights).sum())

    def slopes(self, at: float) -> dict[str, float]:
        """``dL/dg_m`` of each mixer, where every gate is ``at``."""
        with gated(self.mixture, at) as gates:
            sums = dict.fromkeys(gates, 0.0)
            for micro in self._batches():
                losses_BS, domains_BS = _losses(self.model, micro)
                weights = torch.from_numpy(self.weights).to(losses_BS)
                loss = (losses_BS * weights[domains_BS.clamp_min(0)]).sum()
                found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
                for path, slope in zip(gates, found, strict=True):
                    sums[path] += 0.0 if slope is None else float(slope)
        return sums

    @torch.no_grad()
    def squares(self) -> tuple[dict[str, float], dict[str, float]]:
        """``|D_m|^2`` and ``|W0 x|^2`` of each mixer, summed over the tokens of all rows."""
        with measured(self.mixture) as found:
            for micro in self._batches():
                found.real_T = {"decoder": micro.example_ids.flatten() != PADDING}
                if micro.encoder is not None:
                    found.real_T["encoder"] = micro.encoder.example_ids.flatten() != PADDING
                _losses(self.model, micro)
        return found.experts, found.base

    def _batches(self) -> Iterator[MicroBatch]:
        store, device = self.sheet.store, device_of(self.model)
        batches = batches_of(self.rows, store.lengths.tolist(), self.batch_size)
        for batch in batches:
            yield collate(store, [(row,) for row in batch], self.pad_token_id).to(device)
            if self.tick is not None:
                self.tick()


def _losses(model: nn.Module, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the positions from the batch's first target on, and their domains, ``[B, S']``."""
    losses_BS, _ = completion_losses(model, micro)
    return losses_BS, micro.domain_ids[:, -losses_BS.shape[1] :]


def ablation(probe: Probe, units: Units) -> dict[str, float]:
    """What the loss rises by where one unit is taken out; exact."""
    full = probe.loss()
    return {name: probe.loss(paths) - full for name, paths in units.items()}


def first_order(probe: Probe, units: Units) -> dict[str, float]:
    """``- dL/dg`` at the mixture itself."""
    slopes = probe.slopes(1.0)
    return {name: -sum(slopes[path] for path in paths) for name, paths in units.items()}


def path_integral(probe: Probe, units: Units) -> dict[str, float]:
    """``- dL/dg``, its mean on the line from the base to the mixture."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    found = dict.fromkeys(units, 0.0)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        slopes = probe.slopes(float(node))
        for name, paths in units.items():
            found[name] -= float(weight) * sum(slopes[path] for path in paths)
    return found


def size(probe: Probe, units: Units) -> dict[str, float]:
    """What the experts put out, against what their projections do."""
    experts, base = probe.squares()
    found = {}
    for name, paths in units.items():
        of_experts, of_base = (sum(sums[path] for path in paths) for sums in (experts, base))
        found[name] = math.sqrt(of_experts / of_base) if of_base > 0 else math.inf
    return found


methods: Mapping[str, Callable[[Probe, Units], dict[str, float]]] = {
    "path": path_integral,
    "ablation": ablation,
    "first_order": first_order,
    "size": size,
}
"""The first is the default: docs/pruning.md has the figures that it was chosen by."""
DEFAULT = next(iter(methods))


def num_passes(method: str, num_units: int) -> int:
    """Passes over the rows that a score takes."""
    return {"path": NODES, "ablation": num_units + 1}.get(method, 1)


def ranking(scores: Mapping[str, float]) -> list[str]:
    """Units from the most worth on; of equal ones the model's first."""
    return sorted(scores, key=lambda name: -scores[name])


def most_tries(num_units: int) -> int:
    """Passes over the rows that ``fewest`` takes at most."""
    return 1 + (num_units + 1).bit_length()


def fewest(probe: Probe, units: Units, order: Sequence[str], max_rise: float) -> tuple[list[str], float]:
    """The fewest units of a ranking that keep the loss within ``max_rise`` of the mixture's.

    Found by halving, with a pass for each try: that fewer units never do better is taken for granted, and
    what is found is measured.

    Args:
        probe: the mixture and its rows.
        units: all of them.
        order: their names, from the most worth on.
        max_rise: nats a target token.

    Returns:
        the names that stay, and the loss with them.

    Raises:
        UserError: all of them are needed, or none is.
    """
    full = probe.loss()
    low, high, kept_loss = -1, len(order), full
    while high - low > 1:
        middle = (low + high) // 2
        loss = probe.loss([path for name in order[middle:] for path in units[name]])
        if loss - full <= max_rise:
            high, kept_loss = middle, loss
        else:
            low = middle
    if high in (0, len(order)):
        problem = (
            "the base without mixers is within it: nothing would be left"
            if high == 0
            else f"without {order[-1]} alone the loss rises by more: nothing to prune"
        )
        fix = f"give a {'smaller' if high == 0 else 'larger'} rise, or a number to keep"
        raise UserError(f"a rise of {max_rise:g} nats: {problem}", where="--max-loss-rise", fix=fix)
    return list(order[:high]), kept_loss
