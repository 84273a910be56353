"""One rank of ``unit/evaluation/test_before_stage_two.py``: at the end of a run, the experts before stage two
come and go on the live engine, and what that did is written to ``before.json`` in the run's folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dsmixer.checkpoint.restore import read_whole
from dsmixer.config.ds_json import merge_ds_config
from dsmixer.config.recipe import load_recipe
from dsmixer.evaluation.methods import KINDS, evaluate_mixture
from dsmixer.model.load import LoadedBase
from dsmixer.training import run as run_module
from dsmixer.training.before_stage_two import before_stage_two
from dsmixer.training.engine import StageEngine
from dsmixer.training.run import RunRequest, train
from dsmixer.training.run_state import RunState
from dsmixer.training.saving import whole_weights


def finish(state: RunState, base: LoadedBase, engine: StageEngine) -> None:
    """Instead of a mixture and a report."""
    domains = [dataclasses.replace(domain, test=domain.train[:3]) for domain in state.data.domains]
    settings = state.loaded.recipe.evaluation.model_copy(update={"exact_match": False})

    def scored() -> Any:
        return evaluate_mixture(engine.engine, base.tokenizer, domains, settings, kinds=KINDS)["rows"]

    rows, after = scored(), whole_weights(state.mixture)
    with before_stage_two(state):
        before = whole_weights(state.mixture)
    again, rows_again = whole_weights(state.mixture), scored()
    engine.release()
    if state.world.rank != 0:
        return
    (last,) = (state.folder.path / "checkpoints" / "stage1").glob("step-00000006")
    stage_one = read_whole(last, "weights")
    facts = {
        "as stage one left them": all(torch.equal(before[name], stage_one[name]) for name in stage_one),
        "moved since": all(not torch.equal(before[name], after[name]) for name in stage_one),
        "routers are untouched": all(
            torch.equal(before[n], after[n]) for n in after.keys() - stage_one.keys()
        ),
        "put back": all(torch.equal(again[name], after[name]) for name in after),
        "scored as before": rows == rows_again,
    }
    (state.folder.path / "before.json").write_text(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("layouts", type=json.loads)
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run_module.finish_run = finish
    for name, overrides in args.layouts.items():
        loaded, _ = merge_ds_config(load_recipe(args.recipe, [*overrides, f"run.name={name}"]))
        unset_hf_deepspeed_config()
        train(RunRequest(loaded))


if __name__ == "__main__":
    main()
