"""What was trained, from the settings, and how the steps went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsmixer.report.curves import balance_figures, curve_figures
from dsmixer.report.frames import cells, definitions, figures, note, section, table
from dsmixer.report.html import Markup, join, tag
from dsmixer.report.routing_terms import routing_terms
from dsmixer.report.run_folder import RunFolder, numbers
from dsmixer.report.text import readable


def trained(run: RunFolder) -> Markup:
    """The settings that matter, and a line a stage."""
    entries = [(name, value) for name, value in _settings(run) if value not in (None, "")]
    return section("What was trained", definitions(entries), _stage_table(run), key="trained")


def curves(run: RunFolder) -> Markup:
    """Losses of both stages."""
    return section("Training", figures("curve", curve_figures(run)), key="training")


def balance(run: RunFolder) -> Markup:
    """The routing loss with its terms over the steps, and what it does to load and entropy."""
    drawn = figures("balance", balance_figures(run))
    if not drawn:
        return Markup("")
    remark = (
        "RSL in its two terms. The entropy term is told from the routers' entropy, λ, its sign and the ramp; "
        "the balance term is the rest. f is a mean weight over top choices, p a probability."
        if routing_terms(run)
        else "f is a mean weight over top choices, p a probability."
    )
    return section("Routing loss", note(remark), drawn, key="balance")


def _settings(run: RunFolder) -> Iterator[tuple[str, object]]:
    get = run.setting
    yield "Base model", " ".join(str(part) for part in (get("base.model"), get("base.revision")) if part)
    yield (
        "Precision",
        ", ".join(str(part) for part in (get("base.dtype"), _named(run, "base.quantization")) if part),
    )
    yield "Domains", _names(_entries(run, "data.domains"))
    experts = _entries(run, "mixer.experts")
    yield "Experts", _names(experts) if experts else "one a domain"
    targets = get("mixer.targets")
    yield "Projections", ", ".join(map(str, targets)) if isinstance(targets, list) else targets
    yield "Rank, alpha, dropout", _listed(run, "mixer.rank", "mixer.alpha", "mixer.dropout")
    yield "Routers", str(get("mixer.router") or "").replace("_", " ")
    if get("stage2.enabled") is not False:
        yield "Routing", _listed(run, "stage2.routing", "stage2.top_k")
        yield "Experts in stage two", get("stage2.experts")
        yield "Routing loss", _routing_loss(run)
    yield "Row length, packing", _listed(run, "data.max_length", "data.packing")
    yield "Placement, ZeRO stage", _listed(run, "placement.mode", "deepspeed.zero_stage")
    yield "Seed", get("run.seed")


def _routing_loss(run: RunFolder) -> str:
    loss = run.setting("stage2.routing_loss")
    if isinstance(loss, list):
        return ", ".join(str(term.get("loss")) for term in loss if isinstance(term, Mapping))
    if loss not in (None, "lora_mixer"):
        return str(loss)
    rsl = _listed(run, "stage2.rsl.entropy", "stage2.rsl.alpha", "stage2.rsl.entropy_weight")
    return f"RSL: {rsl}" if rsl else ""


def _entries(run: RunFolder, key: str) -> list[str]:
    value = run.setting(key)
    entries = value if isinstance(value, list) else []
    return [str(entry["name"]) for entry in entries if isinstance(entry, Mapping) and "name" in entry]


def _names(names: Sequence[str], limit: int = 24) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)}: {', '.join(names[:limit])}{more}" if names else ""


def _named(run: RunFolder, key: str) -> Any:
    value = run.setting(key)
    return None if value == "none" else value


def _listed(run: RunFolder, *keys: str) -> str:
    return ", ".join(readable(run.setting(key)) for key in keys if run.setting(key) is not None)


def _stage_table(run: RunFolder) -> Markup:
    found = [_stage_row(run, stage) for stage in sorted(run.metrics)]
    if not found:
        return note("No step was logged.")
    columns = list(found[0])
    return join(tag("h3", "Steps"), table(columns, [cells(row.values()) for row in found]))


def _stage_row(run: RunFolder, stage: int) -> dict[str, object]:
    rows = run.metrics[stage]
    losses, speeds, norms = (numbers(rows, key) for key in ("loss", "tokens_per_second", "grad_norm"))
    tenth = max(1, len(losses) // 10)
    return {
        "Stage": "one: experts" if stage == 1 else "two: routers",
        "Steps": rows[-1]["step"],
        "Loss, first tenth": float(losses[:tenth].mean()) if losses.size else None,
        "Loss, last tenth": float(losses[-tenth:].mean()) if losses.size else None,
        "Peak learning rate": run.setting(f"stage{stage}.learning_rate"),
        "Median gradient norm": float(np.median(norms)) if norms.size else None,
        "Median tokens/s": float(np.median(speeds)) if speeds.size else None,
    }
