"""TensorBoard: the figures of ``metrics.jsonl`` as scalars, and pictures of where tokens went.

While a stage trains, load by domain and by router and entropy by layer are drawn from the step's statistics;
at the end of a run, what the report shows of held-out tokens.

Shapes: M routers, G domains, E experts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from dsmixer.config.outline import layer_name, short_layer_name
from dsmixer.report.limits import evenly, largest, shown, with_remarks
from dsmixer.report.routing_terms import BALANCE_KEY, ENTROPY_KEY
from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training.metrics import scalars
from dsmixer.training.telling import tell_problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    from dsmixer.report.plots import HeatMap

Drawing = tuple[str, "HeatMap"]

CHARTS = {
    "token entropy beside ln E": ("routing_entropy", "entropy_limit"),
    "routing loss and its terms": ("rsl", BALANCE_KEY, ENTROPY_KEY),
}
"""Metrics that are drawn together, by title."""


class TensorBoardLog:
    """Scalars under ``stage1/`` and ``stage2/``, heat maps of expert load, and entropy by layer.

    Each stage has a folder of its own, because steps count from 1 in each and a resumed run makes TensorBoard
    forget what comes after the restored step. Only rank 0 writes; on other ranks every method does nothing.

    Args:
        folder: ``runs/NAME/tensorboard``.
        world_rank: of this process.
        expert_names, domain_names, router_names: E, G and M names.
        heat_maps_every: logged steps from one pair of heat maps to the next.
    """

    def __init__(
        self,
        folder: Path,
        *,
        world_rank: int,
        expert_names: Sequence[str],
        domain_names: Sequence[str] = (),
        router_names: Sequence[str] = (),
        heat_maps_every: int = 100,
    ) -> None:
        self.folder = folder
        self.expert_names, self.domain_names = list(expert_names), list(domain_names)
        self.router_names = list(router_names)
        self.heat_maps_every = heat_maps_every
        self._enabled = world_rank == 0
        self._writers: dict[int, SummaryWriter] = {}
        self._num_logged: dict[int, int] = {}

    def write(
        self,
        stage: int,
        step: int,
        values: Mapping[str, object],
        statistics: RoutingStatistics | None = None,
        *,
        last: bool = False,
    ) -> None:
        """One logged step.

        Args:
            stage: 1 or 2.
            step: from 1 in each stage.
            values: the row of ``metrics.jsonl``; what is not a finite number is left out.
            statistics: of the step, reduced over ranks; drawn every ``heat_maps_every`` calls.
            last: whether this is the stage's last step, whose statistics are drawn in any case.
        """
        if not self._enabled:
            return
        try:
            self._write(stage, step, values, statistics, last)
        except OSError as error:  # of its writer thread, too, such as a full disk
            tell_problem(f"warning: nothing more is written to {self.folder}: {error}")
            self._enabled = False
            self.close()

    def _write(
        self,
        stage: int,
        step: int,
        values: Mapping[str, object],
        statistics: RoutingStatistics | None,
        last: bool,
    ) -> None:
        writer = self._writer(stage, step)
        for tag, value in scalars(stage, values).items():
            writer.add_scalar(tag, value, step)
        self._num_logged[stage] = self._num_logged.get(stage, 0) + 1
        due = last or self._num_logged[stage] % self.heat_maps_every == 0
        if statistics is not None and due and bool((statistics.tokens_M > 0).any()):
            self._draw(writer, stage, step, statistics)

    def close(self) -> None:
        """Write out what is waiting; where that can't be written, it is lost, and the run goes on."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        self._writers.clear()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _writer(self, stage: int, step: int) -> SummaryWriter:
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

            writer = SummaryWriter(str(self.folder / f"stage{stage}"), purge_step=step, flush_secs=10)
            charts = {
                title: ["Multiline", [f"stage{stage}/{key}$" for key in keys]]
                for title, keys in CHARTS.items()
            }
            writer.add_custom_scalars({"routers": charts})
            self._writers[stage] = writer
        return self._writers[stage]

    def _draw(self, writer: SummaryWriter, stage: int, step: int, statistics: RoutingStatistics) -> None:
        from dsmixer.report.plots import heat_figure

        drawings = {"load_by_router": load_by_router(statistics, self.expert_names, self.router_names)}
        if statistics.num_domains and float(statistics.domain_MGE.sum()) > 0:
            drawings["load_by_domain"] = load_by_domain(statistics, self.expert_names, self.domain_names)
        figures = {name: heat_figure(heat_map, title=title) for name, (title, heat_map) in drawings.items()}
        figures["entropy_by_layer"] = entropy_by_layer(statistics, self.router_names)
        for name, figure in figures.items():
            add_figure(writer, f"stage{stage}/{name}", figure, step)


def draw_held_out(run_folder: Path, *, enabled: bool = True) -> None:
    """Draw the report's figures of held-out data under ``held_out/``, over those of an earlier evaluation.

    What each expert is worth on each domain; load by domain and by layer, entropy by layer, probability of
    the own expert and how often it came first. A disk that takes no more is told of, and ends no run.
    """
    figures = _held_out_figures(run_folder) if enabled else {}
    if not figures:
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = run_folder / "tensorboard" / "held_out"
    try:
        for earlier in folder.glob("events.*"):
            earlier.unlink()
        with SummaryWriter(str(folder)) as writer:
            for name, figure in figures.items():
                add_figure(writer, f"held_out/{name}", figure, 0)
    except OSError as error:
        tell_problem(f"warning: {folder} is not complete: {error}")


def _held_out_figures(run_folder: Path) -> dict[str, Figure]:
    """The report's, by a name made of the title."""
    from dsmixer.report.figures import routing_figures
    from dsmixer.report.gains import gain_figure
    from dsmixer.report.run_folder import read_run
    from dsmixer.report.scores import scores_of

    run = read_run(run_folder)
    gains = gain_figure(scores_of(run.evaluation, run.config))
    found = {} if gains is None else {"experts_on_domains": gains}
    for title, figure in routing_figures(run.routing) if run.routing is not None else ():
        found[re.sub(r"\W+", "_", title.partition("\n")[0].lower())] = figure
    return found


def add_figure(writer: SummaryWriter, name: str, figure: Figure, step: int) -> None:
    """A figure as a picture."""
    from dsmixer.report.plots import as_pixels

    writer.add_image(name, as_pixels(figure), step, dataformats="HWC")


def entropy_by_layer(statistics: RoutingStatistics, router_names: Sequence[str]) -> Figure:
    """The line of the layers' mean token entropy, nats, under that of ``ln E``."""
    from dsmixer.report.figures import entropy_figure, mean_by_layer

    tokens_M = statistics.tokens_M.double()
    entropy_M = torch.where(tokens_M > 0, statistics.entropy_M.double() / tokens_M, torch.nan)
    names, entropy_L = mean_by_layer(router_names, entropy_M.cpu().numpy())
    return entropy_figure("Entropy of a token, by layer", names, entropy_L, statistics.num_experts)


def load_by_domain(
    statistics: RoutingStatistics, expert_names: Sequence[str], domain_names: Sequence[str]
) -> Drawing:
    """Title and heat map ``[G, E]``: share of a domain's tokens, over routers, that an expert is first for.

    At most 64 of each are shown, the domains and experts with the most tokens; the title says so.
    """
    from dsmixer.report.plots import HeatMap

    counts_GE = statistics.domain_MGE.double().sum(0).cpu().numpy()
    domains, experts = largest(counts_GE.sum(1)), largest(counts_GE.sum(0))
    totals_G1 = counts_GE.sum(1, keepdims=True)
    share_GE = np.divide(counts_GE, totals_G1, out=np.full(counts_GE.shape, np.nan), where=totals_G1 > 0)
    title = with_remarks(
        "First expert of a token, by domain",
        shown("domains", "largest", len(domains), len(counts_GE)),
        shown("experts", "largest", len(experts), counts_GE.shape[1]),
    )
    rows, columns = [domain_names[index] for index in domains], [expert_names[index] for index in experts]
    values = share_GE[np.ix_(domains, experts)]
    return title, HeatMap(values, rows, columns, 0, 1, "share of tokens", percent=True)


def load_by_router(
    statistics: RoutingStatistics, expert_names: Sequence[str], router_names: Sequence[str]
) -> Drawing:
    """Title and heat map ``[M, E]`` of ``E f``, 1 where the load is even.

    At most 64 routers, evenly thinned, and the 64 experts with the largest load are shown; the title says so.
    """
    from dsmixer.report.plots import HeatMap

    load_ME = (statistics.num_experts * statistics.usage("topk").double()).cpu().numpy()
    load_ME[(statistics.tokens_M == 0).cpu().numpy()] = np.nan
    routers, experts = evenly(len(load_ME)), largest(np.nanmean(load_ME, axis=0))
    title = with_remarks(
        "Load of the experts, by router",
        shown("routers", "evenly picked", len(routers), len(load_ME)),
        shown("experts", "largest", len(experts), load_ME.shape[1]),
    )
    values = load_ME[np.ix_(routers, experts)]
    high = max(2.0, float(np.nanmax(values)))
    rows, columns = (
        [_row_name(router_names[index]) for index in routers],
        [expert_names[index] for index in experts],
    )
    return title, HeatMap(values, rows, columns, 0, high, "load (1 = even)")


def _row_name(path: str) -> str:
    """Layer and projection of a router, ``encoder 3 SelfAttention.q``: a whole path has no room."""
    layer, inside = layer_name(path), re.split(r"(?:^|\.)\d+\.", path, maxsplit=1)[-1]
    return path if layer == path else f"{short_layer_name(layer)} {'.'.join(inside.split('.')[-2:])}"
