"""Scores by lm-evaluation-harness, for each way to route a mixture or for a plain model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from dsmixer.config.errors import RunError
from dsmixer.evaluation.harness_tasks import Tasks, quietly
from dsmixer.evaluation.methods import routed_as
from dsmixer.evaluation.scoring import Row
from dsmixer.evaluation.sharing import unwrapped, world

BOOTSTRAP_DRAWS = 200
"""For the standard error of figures that are no mean, such as Matthews' correlation."""


def score_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    methods: Sequence[str],
    *,
    batch_size: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Run tasks once a method.

    Every rank calls this, does the whole of the work and gets the same result: the ranks stay in step, and
    the number of ranks does not enter the figures.

    Args:
        model: a transformers model, with or without mixers, or the DeepSpeed engine around it.
        tokenizer: the model's.
        tasks: what ``read_tasks`` read.
        methods: names that ``routed_as`` knows; without mixers ``base`` alone.
        batch_size: rows a forward pass.
        limit: the first so many records of each task; None: all.
        num_fewshot: solved examples before each prompt; None: as each task says.

    Returns:
        ``rows``: as in ``evaluation.json``, the task as the domain, ``stderr`` beside; ``tasks``: by task its
        version, number of solved examples and of records; ``samples``: by method and task, what was answered
        to each record and what it counted.
    """
    model = unwrapped(model)
    was_training = model.training
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    try:
        for method in methods:
            routed = routed_as(model, method) if has_mixers(model) else contextlib.nullcontext()
            with routed, quietly():
                results = _shared(_results(model, tokenizer, tasks, batch_size, limit, num_fewshot))
            rows += task_rows(results, method)
            facts, samples[method] = _facts(results), _samples(results)
    finally:
        model.train(was_training)
    return {"rows": [*_majority(samples), *rows], "tasks": facts, "samples": samples}


def has_mixers(model: nn.Module) -> bool:
    """Whether a model is a mixture."""
    return getattr(model, "dsmixer", None) is not None


def _results(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    batch_size: int,
    limit: int | None,
    num_fewshot: int | None,
) -> dict[str, Any] | None:
    """What lm-eval returns; None on a rank that is not the first of its machine."""
    from lm_eval import simple_evaluate

    from dsmixer.evaluation.harness_model import LiveModel

    try:
        results: dict[str, Any] | None = simple_evaluate(
            model=LiveModel(model, tokenizer, batch_size, tasks.programs),
            tasks=list(tasks.built),
            task_manager=tasks.manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            confirm_run_unsafe_code=tasks.run_code,
        )
    except (
        AssertionError
    ) as error:  # its way to say that answers, or a choice, are longer than the model reads
        problem = f"lm-eval can't ask this model: {error or 'an answer is longer than it reads'}"
        fix = "leave out the tasks whose answers are longer than the base's positions"
        raise RunError(problem, fix=fix) from error
    return results


def _shared(results: dict[str, Any] | None) -> dict[str, Any]:
    """Rank 0's results on every rank."""
    kept = ("results", "versions", "n-shot", "n-samples", "samples")
    told = [{key: results[key] for key in kept} if world()[0] == 0 and results is not None else None]
    if world()[1] > 1:
        dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    return told[0]


def task_rows(results: dict[str, Any], method: str) -> list[Row]:
    """One row a task or group and figure.

    lm-eval names a figure by metric and filter: the filter is added where a task has several.
    """
    found: list[Row] = []
    for name, figures in results["results"].items():
        keys = [key for key in figures if "," in key and not key.partition(",")[0].endswith("_stderr")]
        several = len({key.partition(",")[2] for key in keys}) > 1
        for key in keys:
            metric, _, rule = key.partition(",")
            number = (figures.get("sample_count") or {}).get(key, figures.get("sample_len", 0))
            error = figures.get(f"{metric}_stderr,{rule}")
            found.append(
                {
                    "domain": name,
                    "method": method,
                    "metric": f"{metric},{rule}" if several else metric,
                    "value": float(figures[key]),
                    "num_examples": int(number),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                }
            )
    return found


def _majority(samples: dict[str, Any]) -> list[Row]:
    """The share of each task's most frequent right choice, where its answers are choices."""
    found: list[Row] = []
    for name, answered in next(iter(samples.values())).items():
        targets = [one["target"] for one in answered if one["filter"] == answered[0]["filter"]]
        if targets and all(isinstance(target, int) for target in targets) and "acc" in answered[0]:
            share = max(targets.count(target) for target in set(targets)) / len(targets)
            row = {"domain": name, "method": "majority", "metric": "acc", "value": share}
            found.append({**row, "num_examples": len(targets), "stderr": None})
    return found


def _facts(results: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "version": results["versions"].get(name),
            "num_fewshot": results["n-shot"].get(name),
            "records": results["n-samples"][name]["original"],
            "scored": results["n-samples"][name]["effective"],
        }
        for name in results["n-samples"]
    }


def _samples(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Without the records and prompts, which are the data's."""
    return {
        name: [
            {
                "record": one["doc_id"],
                "filter": one["filter"],
                "target": _plain(one["target"]),
                "responses": _plain(one["filtered_resps"]),
                **{metric: _plain(one[metric]) for metric in one["metrics"]},
            }
            for one in answered
        ]
        for name, answered in results["samples"].items()
    }


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
