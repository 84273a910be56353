"""Train many runs in one launch, each by ``dsmixer.training.run.train`` as ``launch/train.py`` would.

    deepspeed --num_accelerators W driver_runs.py CASES.json

A case: ``name``, ``recipe``, ``overrides``, ``stages`` ([1, 2]), ``stop_at`` ([[stage, step], ...]: a real
SIGTERM to the last rank before that step, after which the run is taken up again), ``fault`` (a name below).
Instead of a mixture and a report, the end of a run writes what only the live model shows: its trained
weights in ``live.safetensors``, and ``observed.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import signal
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file, save_file
from support.faults import interrupt_steps
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dsmixer.config.checks import check_recipe
from dsmixer.config.ds_json import merge_ds_config
from dsmixer.config.recipe import load_recipe
from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.model.load import LoadedBase
from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training import run as run_module
from dsmixer.training.engine import StageEngine
from dsmixer.training.health import Stopped
from dsmixer.training.loop import Loop, StepReport
from dsmixer.training.run import RunRequest, train
from dsmixer.training.stage_run import RunState


class UnscaledLoop(Loop):
    """The fault that the factor W is missing from the loss."""

    def _forward_backward(
        self, micro: MicroBatch, statistics: RoutingStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alone = dataclasses.replace(self.world, size=1)
        return Loop._forward_backward(dataclasses.replace(self, world=alone), micro, statistics)


class LocalCountsLoop(Loop):
    """The fault that a rank divides by the target tokens of its own rows instead of the step's."""

    def run_step(self, step: int) -> StepReport:
        return Loop.run_step(dataclasses.replace(self, batch_of=self._counted_here), step)

    def _counted_here(self, step: int) -> StepBatch:
        batch = self.batch_of(step)
        counts = torch.zeros_like(batch.target_tokens)
        for micro in batch.micro_batches:
            counts.index_add_(0, micro.domain_ids[micro.labels >= 0], torch.ones(micro.num_targets).long())
        return dataclasses.replace(batch, target_tokens=counts * self.world.size)


LOOPS: dict[str | None, type[Loop]] = {None: Loop, "no_world": UnscaledLoop, "local_counts": LocalCountsLoop}


def observe(state: RunState, base: LoadedBase, engine: StageEngine) -> None:
    """What a test wants of the live model at the end of a run."""
    saved = load_file(Path(state.loaded.recipe.base.model) / "model.safetensors")
    own = dict([*state.mixture.expert_parameters(), *state.mixture.router_parameters()])
    facts: dict[str, Any] = {
        "trained_dtypes": set(),
        "frozen_dtypes": set(),
        "frozen": [],
        "frozen_changed": [],
    }
    live = {}
    for name, parameter in state.mixture.model.named_parameters():
        facts["trained_dtypes" if name in own else "frozen_dtypes"].add(str(parameter.dtype))
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole = parameter.detach().cpu().clone()
        if name in own:
            live[name] = whole
        elif (original := saved.get(name.replace(".base.", "."))) is not None:
            facts["frozen" if torch.equal(whole, original.to(whole.dtype)) else "frozen_changed"].append(name)
    engine.release()
    if state.world.rank == 0:
        save_file(live, state.folder.path / "live.safetensors")
        text = json.dumps({key: sorted(value) for key, value in facts.items()})
        (state.folder.path / "observed.json").write_text(text)


def run_case(case: dict[str, Any]) -> None:
    """One run, taken up again after each stop."""
    name, pending = case["name"], [list(stop) for stop in case.get("stop_at", ())]
    loaded = load_recipe(case["recipe"], [*case["overrides"], f"run.name={name}"])
    loaded, _ = merge_ds_config(loaded)
    check_recipe(loaded)
    interrupt_steps(pending, signal.SIGTERM, LOOPS[case.get("fault")])
    for _ in range(len(pending) + 1):
        unset_hf_deepspeed_config()
        try:
            train(RunRequest(loaded, tuple(case.get("stages", (1, 2)))))
        except Stopped:
            assert len(case["stop_at"]) > len(pending), "stopped without a signal"
        gc.collect()
    assert not pending, f"{name}: the signals at {pending} never came"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("--local_rank", type=int)
    torch.set_num_threads(1)
    run_module.finish_run = observe  # type: ignore[assignment]
    for case in json.loads(parser.parse_args().cases.read_text()):
        print(f"case {case['name']}", flush=True)
        run_case(case)


if __name__ == "__main__":
    main()
