"""What a run knows that its mixture's model card tells."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from dsmixer.config.schema import Recipe
from dsmixer.config.stages import Stage2Config, StageConfig
from dsmixer.report.figures import routing_figures
from dsmixer.report.plots import look
from dsmixer.report.run_folder import METRICS_FILE, read_metrics, read_run
from dsmixer.training.run_state import RunState

ROUTING_PICTURE = "routing.png"


def card_facts(state: RunState) -> dict[str, Any]:
    """Domains, training settings, license and limits, as ``model_card`` takes them."""
    recipe = state.loaded.recipe
    domains = [
        {"name": d.name, "expert": d.expert, "train": len(d.train), "test": len(d.test)}
        for d in state.data.domains
    ]
    return {
        "domains": domains,
        "training": _training(state),
        "license": recipe.run.license,
        "limits": _limits(recipe),
    }


def _training(state: RunState) -> dict[str, dict[str, object]]:
    recipe = state.loaded.recipe
    rows = read_metrics(state.folder.path / METRICS_FILE)
    found: dict[str, dict[str, object]] = {}
    for number, name, stage in ((1, "stage1", recipe.stage1), (2, "stage2", recipe.stage2)):
        if stage.enabled:
            steps = max((row["step"] for row in rows if row["stage"] == number), default=0)
            batch = {
                "steps": steps,
                "rows a step": state.rows[name],
                "longest row, tokens": recipe.data.max_length,
            }
            found[f"stage {number}"] = {**batch, **_settings(stage, recipe)}
    return found


def _settings(stage: StageConfig, recipe: Recipe) -> dict[str, object]:
    settings: dict[str, object] = {
        "learning rate": f"{stage.learning_rate:g}",
        "schedule": f"{stage.scheduler}, warm-up {stage.warmup_ratio:g}",
        "optimizer": f"{stage.optimizer}, weight decay {stage.weight_decay:g}",
        "largest gradient norm": "none" if stage.clip is None else f"{stage.clip:g}",
        "dropout": f"{recipe.mixer.dropout:g}",
        "routing": "by domain",
        "base": f"{recipe.base.dtype}, quantization {recipe.base.quantization}",
        "seed": recipe.run.seed,
    }
    if isinstance(stage, Stage2Config):
        rsl, k = stage.rsl, f", K={stage.top_k}" if stage.routing in ("topk", "hard_soft") else ""
        settings["routing"] = f"{stage.routing}{k}"
        settings["experts"] = stage.experts
        settings["RSL"] = (
            f"alpha {rsl.alpha:g}, entropy weight {rsl.entropy_weight:g} ({rsl.entropy}), "
            f"usage {rsl.usage} of the {rsl.usage_from.replace('_', ' ')}, ramp {rsl.ramp:g}"
        )
        if stage.experts == "preserve":
            settings["preserve"] = f"beta {stage.preserve.beta:g}"
    return settings


def _limits(recipe: Recipe) -> list[str]:
    limits = []
    if not recipe.stage2.enabled:
        limits.append("Stage two was not run: the routers are as they started, and choose at random.")
    if recipe.evaluation.max_examples is not None:
        limits.append(f"Figures are of at most {recipe.evaluation.max_examples} test examples a domain.")
    if not recipe.evaluation.exact_match:
        limits.append("Written answers were not evaluated.")
    return limits


def routing_picture(run_folder: Path) -> dict[str, bytes]:
    """Heat map of the experts that held-out tokens of each domain put first, as a PNG by its name.

    Nothing where the run has no such figures.
    """
    routing = read_run(run_folder).routing
    if routing is None or not np.isfinite(routing.load).any():
        return {}
    _, figure = next(routing_figures(routing))
    buffer = io.BytesIO()
    with look():
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return {ROUTING_PICTURE: buffer.getvalue()}
