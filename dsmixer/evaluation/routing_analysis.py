"""Where the routers send held-out tokens.

Shapes: M routers, G domains, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsmixer.config.outline import layer_number
from dsmixer.data.collate import PADDING, EncoderRows, MicroBatch
from dsmixer.evaluation.examples import ExampleWeights, write_examples
from dsmixer.evaluation.sharing import summed
from dsmixer.evaluation.sheet import Sheet
from dsmixer.model.inject import Mixture
from dsmixer.routing.context import BatchRouting
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics


class RoutingCounts(RoutingStatistics):
    """The step's statistics, and for any number of domains how often the own expert came first and how likely
    it was; with them, who spoke at the tokens of a few texts.

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
        self.own_MG4 = torch.zeros(len(mixture.routers), len(own), 4, dtype=torch.float64, device=device)
        self.examples: ExampleWeights | None = None

    @torch.no_grad()
    def record(self, router: int, output: RouterOutput, domains_T: torch.Tensor | None) -> None:
        """Add one router's micro-batch, by domain: real tokens, own expert first, entropy, own expert's p."""
        super().record(router, output, domains_T)
        if self.examples is not None:
            self.examples.record(router, output)
        assert domains_T is not None
        real_T = domains_T >= 0
        own_N, p_NE = self.own_G[domains_T[real_T]], output.p_TE[real_T]
        first_N = p_NE.argmax(1)
        own_p_N = p_NE.gather(1, own_N.clamp_min(0)[:, None])[:, 0]
        columns = (torch.ones_like(first_N), first_N == own_N, output.entropy_T()[real_T], own_p_N)
        values = torch.stack([column.double() for column in columns], dim=1)
        self.own_MG4[router].index_add_(0, domains_T[real_T], values)

    def over_ranks(self, device: torch.device) -> tuple[torch.Tensor, Firsts, ExampleWeights | None]:
        """``own_MG4``, first choices and texts of all ranks."""
        own_MG4, first_ME = summed(self.own_MG4, device), summed(self.top1_ME, device)
        domain_MGE = summed(self.domain_MGE, device) if self.num_domains else None
        texts = None if self.examples is None else self.examples.over_ranks(device)
        return own_MG4, Firsts(first_ME, domain_MGE), texts


@dataclass(frozen=True)
class Firsts:
    """First choices, counted.

    Attributes:
        first_ME: of all domains.
        domain_MGE: by domain; None where domains x experts are too many.
    """

    first_ME: torch.Tensor
    domain_MGE: torch.Tensor | None


class RoutingReport(dict[str, Any]):
    """The content of ``routing.json``; beside it stands what belongs into ``examples.json``.

    Attributes:
        examples: who spoke at the tokens of a few texts; None where no pass was watched.
    """

    examples: ExampleWeights | None = None


def write_texts(run_folder: Path, routing: RoutingReport | None, tokenizer: Any) -> None:
    """Write ``examples.json`` beside ``routing.json``; there is no report where the mixture was not scored.

    Raises:
        RefusedError: it can't be written.
    """
    write_examples(run_folder, None if routing is None else routing.examples, tokenizer)


def recorder(mixture: Mixture, sheet: Sheet, counts: RoutingCounts) -> Any:
    """A context around each forward pass that counts tokens of rows with the right completion once."""
    counts.examples = watched = ExampleWeights(mixture, sheet)

    @contextmanager
    def around(micro: MicroBatch) -> Iterator[None]:
        counted = torch.from_numpy(sheet.is_target_row).to(micro.example_ids.device)
        encoder = None if micro.encoder is None else _counted(micro.encoder, counted)
        batch = replace(_counted(micro, counted), encoder=encoder)
        with watched.watching(micro), _recording(mixture, batch, counts):
            yield

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
    mixture: Mixture,
    sheet: Sheet,
    own_MG4: torch.Tensor,
    firsts: Firsts,
    examples: ExampleWeights | None = None,
) -> RoutingReport:
    """What the routers did, as plain JSON values: the content of ``routing.json``.

    Returns:
        ``routers``, ``experts``, ``domains``: module paths and names; ``layers``: of each router, None where
        its path has no number; ``own_first_share`` ``[M, G]``: share of real tokens whose first expert is the
        domain's own, None where the mixture has none for it; ``own_probability`` ``[M, G]``: mean probability
        of that expert, likewise; ``entropy`` ``[M]``: mean token entropy, nats; ``expert_load`` ``[M, E]``:
        share of first choices; ``load`` ``[M, G, E]``: the same of each domain's tokens, absent where
        domains x experts are too many; in all of these None where a router saw none of the tokens;
        ``summary``: means over routers, see ``_summary``.
    """
    tokens_MG, own_MG, entropy_MG, own_p_MG = own_MG4.unbind(2)
    known_G = torch.tensor([expert in mixture.expert_names for expert in sheet.own_experts])
    unknown_MG = (tokens_MG == 0) | ~known_G
    share_MG, probability_MG = (
        (sum_MG / tokens_MG).masked_fill(unknown_MG, torch.nan) for sum_MG in (own_MG, own_p_MG)
    )
    entropy_M = entropy_MG.sum(1) / tokens_MG.sum(1)
    layers = [layer_number(path) for path in mixture.routers]
    report = RoutingReport()
    report.examples = examples
    report |= {
        "routers": list(mixture.routers),
        "layers": layers,
        "experts": list(mixture.expert_names),
        "domains": list(sheet.domains),
        "own_first_share": _plain(share_MG),
        "own_probability": _plain(probability_MG),
        "entropy": _plain(entropy_M),
        "expert_load": _shares(firsts.first_ME),
    }
    if firsts.domain_MGE is not None:
        report["load"] = _shares(firsts.domain_MGE)
    report["summary"] = _summary(sheet, share_MG, probability_MG, layers) | {
        "entropy": _plain(entropy_M.nanmean()),
        "ln_experts": math.log(len(mixture.expert_names)),
    }
    return report


def _shares(counts: torch.Tensor) -> Any:
    return _plain(counts / counts.sum(-1, keepdim=True))  # 0 / 0 of a router that saw no token


def _plain(values: torch.Tensor) -> Any:
    """Nested lists of numbers, None in place of NaN."""
    return _without_nan(values.tolist())


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if math.isnan(values) else values


def _summary(
    sheet: Sheet,
    share_MG: torch.Tensor,
    probability_MG: torch.Tensor,
    layers: Sequence[int | None],
) -> dict[str, Any]:
    """``own_first`` by domain, the mean over routers that saw tokens of it, and ``own_first_later_layers``
    over those in layers after the first; ``own_probability`` likewise over all layers; of each the mean over
    domains under ``…_mean``, None where there are none.
    """
    first = min((layer for layer in layers if layer is not None), default=None)
    later = torch.tensor([layer is not None and layer != first for layer in layers])
    found: dict[str, Any] = {}
    kinds = {
        "own_first": share_MG,
        "own_first_later_layers": share_MG[later],
        "own_probability": probability_MG,
    }
    for key, rows_MG in kinds.items():
        means = zip(sheet.domains, rows_MG.nanmean(0).tolist(), strict=True)
        shares = {domain: mean for domain, mean in means if not math.isnan(mean)}
        found[key] = shares
        found[f"{key}_mean"] = sum(shares.values()) / len(shares) if shares else None
    return found
