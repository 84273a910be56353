"""After the last stage: publish the mixture, evaluate it, write the report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.checkpoint.atomic import write_text
from dsmixer.config.schema import Recipe
from dsmixer.evaluation.harness import score_tasks
from dsmixer.evaluation.harness_tasks import read_tasks
from dsmixer.evaluation.methods import evaluate_mixture
from dsmixer.evaluation.routing_analysis import write_texts
from dsmixer.evaluation.table import print_evaluation, write_evaluation
from dsmixer.model.load import LoadedBase
from dsmixer.report.page import build_report
from dsmixer.report.run_folder import METRICS_FILE, read_metrics
from dsmixer.training.before_stage_two import before_stage_two, kinds_to_score
from dsmixer.training.card_facts import card_facts, routing_picture
from dsmixer.training.engine import StageEngine
from dsmixer.training.progress import console, print_summary
from dsmixer.training.run_state import RunState
from dsmixer.training.saving import whole_weights
from dsmixer.training.telling import lossy
from dsmixer.training.tensorboard import draw_held_out
from dsmixer.training.world import once

Tensors = dict[str, torch.Tensor]


def finish_run(state: RunState, base: LoadedBase, engine: StageEngine) -> None:
    """Publish, evaluate on the live engine, and write the report last: a run with a report is finished.

    Every rank calls it; rank 0 writes.
    """
    weights = whole_weights(state.mixture)
    facts = card_facts(state)
    state.pulse.enter("publishing")
    state.keep_lock()
    _publish(state, base, weights, facts)
    if not state.loaded.recipe.stage2.enabled:
        fresh = state.loaded.recipe.mixer.mixture is None
        as_they_were = "as they started, and choose at random" if fresh else "those of mixer.mixture"
        state.say(f"stage two was not enabled: the routers are {as_they_were}")
    if not any(domain.test for domain in state.data.domains):
        state.say("no domain has a test part: nothing was evaluated")
    elif state.loaded.recipe.evaluation.enabled:
        state.pulse.enter("evaluating")
        result = _evaluate(state, base, engine)
        state.pulse.enter("publishing")
        pictures = once(state.world, lambda: routing_picture(state.folder.path))
        _publish(state, base, weights, {**facts, "evaluation": result, "pictures": pictures})
    state.pulse.enter("writing the report")
    state.keep_lock()
    report = once(state.world, lambda: str(build_report(state.folder.path)))
    if state.world.rank == 0:
        print_summary(_stage_rows(state), title="training", file=lossy(sys.stdout))
    state.say(f"mixture: {state.folder.mixture}\nreport:  {report}")
    once(state.world, lambda: write_text(state.folder.finished_mark, "done\n"))


def _stage_rows(state: RunState) -> list[dict[str, object]]:
    """One line a stage: steps, first and last loss, real tokens, time in steps."""
    found: list[dict[str, object]] = []
    rows = read_metrics(state.folder.path / METRICS_FILE)
    for stage in sorted({row["stage"] for row in rows}):
        own = [row for row in rows if row["stage"] == stage]
        found.append(
            {
                "stage": stage,
                "steps": own[-1]["step"],
                "first loss (nats)": own[0]["loss"],
                "last loss (nats)": own[-1]["loss"],
                "logged tokens": sum(row["tokens"] for row in own),
                "seconds in logged steps": sum(row["seconds"] for row in own),
            }
        )
    return found


def _publish(state: RunState, base: LoadedBase, weights: Tensors, facts: dict[str, Any]) -> None:
    recipe = state.loaded.recipe

    def save() -> None:
        save_mixture(
            state.mixture,
            state.folder.mixture,
            tokenizer=base.tokenizer,
            base=_lasting(recipe.base.model),
            revision=recipe.base.revision,
            state=weights,
            facts=facts,
        )

    once(state.world, save)


def _lasting(model: str) -> str:
    """A local base by its absolute path, so that the mixture is usable from any folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _rows(recipe: Recipe) -> int:
    """Of a forward pass of the evaluation."""
    last = recipe.stage2 if recipe.stage2.enabled else recipe.stage1
    return recipe.evaluation.batch_size or last.micro_batch_size


def _evaluate(state: RunState, base: LoadedBase, engine: StageEngine) -> dict[str, Any]:
    recipe = state.loaded.recipe
    state.say("evaluating on the test data")
    result = evaluate_mixture(
        engine.engine,
        base.tokenizer,
        state.data.domains,
        recipe.evaluation.model_copy(update={"batch_size": _rows(recipe)}),
        max_length=recipe.data.max_length,
        seed=recipe.run.seed,
        kinds=kinds_to_score(state),
        stage_one=before_stage_two(state),
    )
    if recipe.evaluation.tasks:
        # hours of scoring shall not go with a task that fails
        once(state.world, lambda: write_evaluation(state.folder.path, result))
        _add_tasks(result, state, base, engine)
    state.keep_lock()
    once(state.world, lambda: write_evaluation(state.folder.path, result))
    once(state.world, lambda: write_texts(state.folder.path, result["routing"], base.tokenizer))
    once(state.world, lambda: draw_held_out(state.folder.path, enabled=recipe.run.tensorboard))
    if state.world.rank == 0:
        print_evaluation(result, console(lossy(sys.stdout)))
    return result


def _add_tasks(result: dict[str, Any], state: RunState, base: LoadedBase, engine: StageEngine) -> None:
    """Run lm-eval's tasks on the live engine, base and mixture, and put their figures beside the domains'."""
    recipe = state.loaded.recipe
    state.say(f"running the tasks {', '.join(recipe.evaluation.tasks)}")
    scored = score_tasks(
        engine.engine,
        base.tokenizer,
        read_tasks(recipe.evaluation.tasks, where=state.loaded.where("evaluation.tasks")),
        ("base", "mixture"),
        batch_size=_rows(recipe),
        limit=recipe.evaluation.max_examples,
    )
    result["rows"] += scored["rows"]
    result["tasks"] = scored["tasks"]
