"""Where the routers send held-out tokens.

Shapes: M routers, G domains, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch

from dsmixer.data.collate import PADDING, EncoderRows, MicroBatch
from dsmixer.evaluation.sharing import summed
from dsmixer.evaluation.sheet import Sheet
from dsmixer.model.inject import Mixture
from dsmixer.routing.context import BatchRouting
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics


class RoutingCounts(RoutingStatistics):
    """The step's statistics, and for any number of domains how often the own expert came first.

    Args:
        mixture: whose routers are counted.
        own_experts: for each domain, the expert that serves it, possibly none of the mixture's.
        device: where the routers work.
    """

    def __init__(self, mixture: Mixture, own_experts: Sequence[str], device: torch.device) -> None:
        names = mixture.expert_names
        super().__init__(len(mixture.routers), len(names), len(own_experts), device)
        own = [names.index(expert) if expert in names else -1 for expert in own_experts]
        self.own_G = torch.tensor(own, device=device)
        self.own_MG3 = torch.zeros(len(mixture.routers), len(own), 3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def record(self, router: int, output: RouterOutput, domains_T: torch.Tensor | None) -> None:
        """Add one router's micro-batch: real tokens, own expert first, entropy; by domain."""
        super().record(router, output, domains_T)
        assert domains_T is not None
        real_T = domains_T >= 0
        domains = domains_T[real_T]
        first = output.p_TE.argmax(1)[real_T]
        columns = (torch.ones_like(first), first == self.own_G[domains], output.entropy_T()[real_T])
        values = torch.stack([column.double() for column in columns], dim=1)
        self.own_MG3[router].index_add_(0, domains, values)

    def over_ranks(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``own_MG3`` and ``domain_MGE`` of all ranks; None where domains x experts are too many."""
        own_MG3 = summed(self.own_MG3, device)
        return own_MG3, summed(self.domain_MGE, device) if self.num_domains else None


def recorder(mixture: Mixture, sheet: Sheet, counts: RoutingCounts) -> Any:
    """A context around each forward pass that counts tokens of rows with the right completion once."""

    def around(micro: MicroBatch) -> AbstractContextManager[None]:
        counted = torch.from_numpy(sheet.is_target_row).to(micro.example_ids.device)
        encoder = None if micro.encoder is None else _counted(micro.encoder, counted)
        return _recording(mixture, replace(_counted(micro, counted), encoder=encoder), counts)

    return around


def _counted(tokens: MicroBatch | EncoderRows, counted: torch.Tensor) -> BatchRouting:
    """Of the tokens of one stream, those of rows that are counted."""
    examples_T = tokens.example_ids.flatten()
    real_T = (examples_T != PADDING) & counted[examples_T.clamp_min(0)]
    domains_T = torch.where(real_T, tokens.domain_ids.flatten(), PADDING)
    return BatchRouting(mask_T=real_T.float(), domains_T=domains_T)


@contextmanager
def _recording(mixture: Mixture, batch: BatchRouting, counts: RoutingCounts) -> Iterator[None]:
    try:
        with mixture.context.recording(batch, counts):
            yield
    finally:
        mixture.context.clear()


def routing_report(
    mixture: Mixture, sheet: Sheet, own_MG3: torch.Tensor, domain_MGE: torch.Tensor | None
) -> dict[str, Any]:
    """What the routers did, as plain JSON values: the content of ``routing.json``.

    Returns:
        ``routers``, ``experts``, ``domains``: module paths and names; ``layers``: of each router, None where
        its path has no number; ``own_first_share`` ``[M, G]``: share of real tokens whose first expert is the
        domain's own, None where the mixture has none for it; ``entropy`` ``[M]``: mean token entropy, nats;
        ``load`` ``[M, G, E]``: share of first choices, absent where domains x experts are too many;
        ``summary``: means over routers, see ``_summary``.
    """
    tokens_MG, own_MG, entropy_MG = own_MG3.unbind(2)
    share_MG = own_MG / tokens_MG.clamp_min(1)
    entropy_M = entropy_MG.sum(1) / tokens_MG.sum(1).clamp_min(1)
    known = [expert in mixture.expert_names for expert in sheet.own_experts]
    layers = [layer_of(path) for path in mixture.routers]
    report: dict[str, Any] = {
        "routers": list(mixture.routers),
        "layers": layers,
        "experts": list(mixture.expert_names),
        "domains": list(sheet.domains),
        "own_first_share": [
            [float(share) if there else None for share, there in zip(row, known, strict=True)]
            for row in share_MG
        ],
        "entropy": entropy_M.tolist(),
    }
    if domain_MGE is not None:
        report["load"] = (domain_MGE / domain_MGE.sum(2, keepdim=True).clamp_min(1)).tolist()
    report["summary"] = _summary(sheet, share_MG, known, layers) | {
        "entropy": float(entropy_M.mean()),
        "ln_experts": math.log(len(mixture.expert_names)),
    }
    return report


def _summary(
    sheet: Sheet, share_MG: torch.Tensor, known: Sequence[bool], layers: Sequence[int | None]
) -> dict[str, Any]:
    """``own_first`` by domain, the mean over routers, and ``own_first_later_layers`` over the layers after
    the first; ``own_first_mean`` and ``own_first_later_layers_mean`` over domains, None where there are none.
    """
    first = min((layer for layer in layers if layer is not None), default=None)
    later = torch.tensor([layer is not None and layer != first for layer in layers])
    found: dict[str, Any] = {}
    for key, rows_MG in (("own_first", share_MG), ("own_first_later_layers", share_MG[later])):
        there = [g for g, is_known in enumerate(known) if is_known and len(rows_MG)]
        shares = {sheet.domains[g]: float(rows_MG[:, g].mean()) for g in there}
        found[key] = shares
        found[f"{key}_mean"] = sum(shares.values()) / len(shares) if shares else None
    return found


def layer_of(path: str) -> int | None:
    """The layer's number in a module path: its first part that is a number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
