"""What a logged step says: the routers' figures, and ``metrics.jsonl``.

Shapes: M routers, G domains, E experts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from deepspeed.accelerator import get_accelerator

from dsmixer.checkpoint.atomic import flush, make_folder, write_text
from dsmixer.report.run_folder import METRICS_FILE, read_metrics
from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training.telling import tell_problem

MAX_NAMED_EXPERTS = 32  # load/NAME is logged up to here, so that the number of keys stays bounded


def routing_metrics(
    statistics: RoutingStatistics,
    *,
    expert_names: Sequence[str] | None = None,
    expert_of_domain: Sequence[int] | None = None,
) -> dict[str, float]:
    """The routers of one optimizer step as a few numbers; routers that saw no token do not count.

    ``f`` below is an expert's mean renormalised top-k weight at a router, ``p`` its mean probability.

    * ``routing_entropy``, ``routing_entropy_bits``: entropy of a token's ``p``, mean over tokens and routers,
      in nats and in bits; ``entropy_limit`` is ``ln E``, in nats, which no entropy exceeds.
    * ``load_variance``: variance over experts of ``E f``, mean over routers; 0 is even load, E - 1 collapse.
    * ``p_variance``: variance over tokens of an expert's probability, mean over experts and routers: our
      reading of Var(p) in arXiv 2507.00029, eq. 10. Uneven load alone can't raise it; specialisation does.
    * ``load_max``, ``load_min``: largest and smallest ``E f`` of the means over routers; 1 is even load.
    * ``dead_experts``: experts that no router gave any weight.
    * ``own_expert_share``: share of first choices, over routers and tokens, that fall on the expert of the
      token's domain. Only with ``expert_of_domain``, and where statistics by domain were kept.
    * ``load/NAME``: ``E f`` of each expert, mean over routers. Only with ``expert_names`` and E <= 32.

    Args:
        statistics: sums of the step, already reduced over ranks.
        expert_names: names of the E experts.
        expert_of_domain: index of the expert that serves each of the G domains; -1 for none.

    Returns:
        The numbers by name; nothing where no router saw a token, as in stage one.
    """
    seen_M = statistics.tokens_M > 0
    if not bool(seen_M.any()):
        return {}
    num_experts = statistics.num_experts
    tokens_M1 = statistics.tokens_M[seen_M].double()[:, None]
    entropy = float((statistics.entropy_M[seen_M].double() / tokens_M1[:, 0]).mean())
    load_ME = num_experts * statistics.usage("topk")[seen_M].double()
    p_ME = statistics.p_ME[seen_M].double() / tokens_M1
    p_squared_ME = statistics.p_squared_ME[seen_M].double() / tokens_M1
    load_E = load_ME.mean(0)
    metrics = {
        "routing_entropy": entropy,
        "routing_entropy_bits": entropy / math.log(2.0),
        "entropy_limit": math.log(num_experts),
        "load_variance": float(load_ME.var(1, correction=0).mean()),
        "p_variance": float((p_squared_ME - p_ME.square()).clamp_min(0).mean()),
        "load_max": float(load_E.max()),
        "load_min": float(load_E.min()),
        "dead_experts": float((load_E == 0).sum()),
    }
    own_share = _own_expert_share(statistics, expert_of_domain)
    if own_share is not None:
        metrics["own_expert_share"] = own_share
    if expert_names is not None and num_experts <= MAX_NAMED_EXPERTS:
        metrics |= {f"load/{name}": load for name, load in zip(expert_names, load_E.tolist(), strict=True)}
    return metrics


def _own_expert_share(statistics: RoutingStatistics, expert_of_domain: Sequence[int] | None) -> float | None:
    if expert_of_domain is None or statistics.num_domains == 0:
        return None
    served = [(domain, expert) for domain, expert in enumerate(expert_of_domain) if expert >= 0]
    if not served:
        return None
    domains, experts = (list(column) for column in zip(*served, strict=True))
    counts_MGE = statistics.domain_MGE[:, domains].double()
    total = float(counts_MGE.sum())
    own = float(counts_MGE[:, torch.arange(len(domains)), experts].sum())
    return own / total if total else None


def scalars(stage: int, row: Mapping[str, object]) -> dict[str, float]:
    """What a log of curves takes of a row of ``metrics.jsonl``: its finite numbers, as ``stage2/loss``."""
    return {
        f"stage{stage}/{key}": value
        for key, value in row.items()
        if key not in ("stage", "step") and isinstance(value, int | float) and math.isfinite(value)
    }


class DeviceMemory:
    """What the tensors of this rank take on its device, from now on; a CPU's allocator does not count.

    Args:
        device: of the rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type != "cpu":
            get_accelerator().reset_peak_memory_stats(device.index)

    def metrics(self) -> dict[str, int]:
        """``peak_memory``: the most so far, in bytes; nothing on a CPU."""
        if self._device.type == "cpu":
            return {}
        return {"peak_memory": get_accelerator().max_memory_allocated(self._device.index)}


class MetricsLog:
    """``metrics.jsonl``: one JSON object a logged step, each (stage, step) once, in the order of training.

    Only rank 0 opens one. A number that is not finite is written as ``null``, because JSON has none. No row
    waits for the disk before ``flush``. Rows that a full disk does not take are kept and written with a later
    one: no run ends for want of a log.

    Args:
        folder: the run folder; made where it is missing.
        restored: (stage, step) of the checkpoint the run goes on from; rows past it are cut, for their steps
            come again. None starts anew: every row goes.
    """

    def __init__(self, folder: Path, *, restored: tuple[int, int] | None) -> None:
        make_folder(folder)
        self.path = folder / METRICS_FILE
        self._last = _cut(self.path, restored)
        self._file = self.path.open("ab", buffering=0)
        flush(folder)  # its name
        self._waiting = b""

    @property
    def last(self) -> tuple[int, int] | None:
        """(stage, step) of the last row, None where there is none."""
        return self._last

    def write(self, stage: int, step: int, values: Mapping[str, object]) -> dict[str, object]:
        """Append the row of one step, and hand it to the system.

        Args:
            stage: 1 or 2.
            step: from 1 in each stage; later than every row before.
            values: numbers (also tensors with one element), text, or None, by name.

        Returns:
            The row as written.
        """
        assert self._last is None or (stage, step) > self._last, f"{(stage, step)} after {self._last}"
        row: dict[str, object] = {"stage": stage, "step": step}
        row |= {key: _plain(value) for key, value in values.items()}
        warned = bool(self._waiting)
        self._waiting += json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            self._write_waiting()
        except OSError as error:
            if not warned:
                self._warn(error, "its rows wait")
        self._last = (stage, step)
        return row

    def flush(self) -> None:
        """Wait until the rows are on the disk; what it refuses is told, and no reason to stop."""
        warned = bool(self._waiting)
        try:
            self._write_waiting()
            os.fsync(self._file.fileno())
        except OSError as error:
            if not warned:
                self._warn(error, "a power cut may take its last rows")

    def _warn(self, error: OSError, result: str) -> None:
        tell_problem(f"warning: {self.path}: {error.strerror}; {result}")

    def _write_waiting(self) -> None:
        while self._waiting:
            written = self._file.write(self._waiting)  # of a full disk's last bytes a part may be written
            self._waiting = self._waiting[written or 0 :]

    def close(self) -> None:
        """Write what waits; rows that the disk still refuses are lost, which is told."""
        try:
            with self._file:
                self._write_waiting()
        except OSError as error:
            self._warn(error, "its last rows are lost")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cut(path: Path, restored: tuple[int, int] | None) -> tuple[int, int] | None:
    """Keep the rows up to ``restored``, the later of two with one (stage, step); answer the last one kept."""
    rows = {(row["stage"], row["step"]): row for row in read_metrics(path)}
    kept = sorted(pair for pair in rows if restored is not None and pair <= restored)
    text = "".join(json.dumps(rows[pair]) + "\n" for pair in kept)
    if path.exists() and text != path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, text)
    return kept[-1] if kept else None


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
