"""Train many runs in one launch, each by ``dsmixer.training.run.train`` as ``launch/train.py`` would.

    deepspeed --num_accelerators W driver_runs.py CASES.json

A case: ``name``, ``recipe``, ``overrides``, ``stages`` ([1, 2]), ``stop_at`` ([[stage, step], ...]: a real
SIGTERM to the last rank before that step, after which the run is taken up again), ``fault`` (a name below),
``fails`` (whether the fault ends the run once, with which it is taken up again without it), ``take`` ([run,
stage, step]: go on from a copy of what that run had saved by then), ``start_from`` and ``allow_changes``
(of the request), ``adapters`` (a run whose published experts are imported), ``finish`` (evaluate, publish).
Instead of a mixture and a report, the end of a run writes what only the live model shows: its trained
weights in ``live.safetensors``, and ``observed.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file, save_file
from support.faults import FEW_BYTES, interrupt_steps, limit_files
from support.oracles import plain_base
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dsmixer.adapters.mixture_folder import read_description
from dsmixer.config.checks import check_recipe
from dsmixer.config.ds_json import merge_ds_config
from dsmixer.config.recipe import LoadedRecipe, load_recipe
from dsmixer.config.schema import BaseConfig
from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.evaluation.methods import evaluate_mixture
from dsmixer.model.load import LoadedBase
from dsmixer.placement.groups import unpartitioned
from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training import finish as finish_module
from dsmixer.training import run as run_module
from dsmixer.training.engine import StageEngine
from dsmixer.training.health import Stopped
from dsmixer.training.loop import Loop, StepReport
from dsmixer.training.optimizer import StepPlan
from dsmixer.training.run import RunRequest, train
from dsmixer.training.run_state import RunState
from dsmixer.training.saving import SaveError, whole_weights
from dsmixer.training.world import gather_objects


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


class OwnersApartLoop(Loop):
    """The fault that owners of one expert do not add up their gradients."""

    def run_step(self, step: int) -> StepReport:
        self.engine.shared.add_up = lambda grads: None  # type: ignore[method-assign]
        return Loop.run_step(self, step)


class CountedTwiceLoop(Loop):
    """The fault that every owner of an expert adds its gradient to the expert's norm."""

    def run_step(self, step: int) -> StepReport:
        self.engine.optimizer.counted_U.fill_(1.0)
        return Loop.run_step(self, step)


class PreserveScaledLoop(Loop):
    """The fault that the preserve term is added once for each rank of a group instead of once."""

    def _update(
        self, step: int, statistics: RoutingStatistics | None
    ) -> tuple[float, torch.Tensor, StepPlan]:
        stage, size = self.stage, self.engine.mixture.placement.layout.size

        class Scaled:
            """The stage, with another beta."""

            def plan(self, step: int, statistics: RoutingStatistics | None) -> StepPlan:
                plan = stage.plan(step, statistics)
                beta = plan.preserve_beta
                return dataclasses.replace(plan, preserve_beta=None if beta is None else beta * size)

        return Loop._update(dataclasses.replace(self, stage=Scaled()), step, statistics)  # type: ignore[arg-type]


class FullDiskLoop(Loop):
    """The fault that the last rank cannot write a file of more than a few bytes in one step of stage one."""

    step = 3

    def run_step(self, step: int) -> StepReport:
        here = self.stage.number == 1 and self.world.rank == self.world.size - 1
        limit_files(FEW_BYTES if here and step + 1 == self.step else None)
        return Loop.run_step(self, step)


class FullAtTheEndLoop(FullDiskLoop):
    """The same in the stage's last step."""

    step = 6


LOOPS: dict[str | None, type[Loop]] = {
    None: Loop,
    "no_world": UnscaledLoop,
    "local_counts": LocalCountsLoop,
    "owners_apart": OwnersApartLoop,
    "owners_counted_twice": CountedTwiceLoop,
    "preserve_times_ep": PreserveScaledLoop,
    "full_between": FullDiskLoop,
    "full_at_the_end": FullAtTheEndLoop,
}


def _as_loaded(base: BaseConfig) -> dict[str, torch.Tensor]:
    """The base's tensors as on the disk; in 4 bits packed weights and scales, as bitsandbytes makes them."""
    if base.quantization == "none":
        return load_file(Path(base.model) / "model.safetensors")
    return dict(plain_base(base).state_dict())


def _scales(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The scales of a model's packed weights, by the names of ``state_dict``; every rank has all of them."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "quant_state")
        for key, tensor in parameter.quant_state.as_dict(packed=True).items()
    }


def _same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Read as numbers, packed weights may be NaN, which no number equals."""
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, two)]
    return one.dtype == two.dtype and torch.equal(*bits)


def _finish(state: RunState, base: LoadedBase, engine: StageEngine) -> None:
    """Publish and evaluate, on some of the training examples, as the end of a run does."""
    finish_module._publish(state, base, whole_weights(state.mixture), {})
    recipe = state.loaded.recipe
    settings = recipe.evaluation.model_copy(update={"generate_max_new_tokens": 2})
    domains = [dataclasses.replace(domain, test=domain.train[:4]) for domain in state.data.domains]
    found = evaluate_mixture(engine.engine, base.tokenizer, domains, settings)
    if state.world.rank == 0:
        (state.folder.path / "evaluated.json").write_text(json.dumps(found["rows"]))


def observe(state: RunState, base: LoadedBase, engine: StageEngine, *, finish: bool = False) -> None:
    """What a test wants of the live model at the end of a run."""
    if finish:
        _finish(state, base, engine)
    saved = _as_loaded(state.loaded.recipe.base)
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
            same = _same_bits(whole, original.to(whole.dtype))
            facts["frozen" if same else "frozen_changed"].append(name)
    for name, scale in _scales(state.mixture.model).items():
        same = _same_bits(scale, saved[name.replace(".base.", ".")])
        facts["frozen" if same else "frozen_changed"].append(name)
    facts["class_of_base"] = {type(m.base).__name__ for m in state.mixture.mixers.values()}
    engine.release()
    facts["owners_apart"] = _owners_apart(state)
    if state.world.rank == 0:
        save_file(live, state.folder.path / "live.safetensors")
        text = json.dumps({key: sorted(value) for key, value in facts.items()})
        (state.folder.path / "observed.json").write_text(text)


def _owners_apart(state: RunState) -> list[str]:
    """Experts with several owners whose weights are not the same in every bit at all of them."""
    layout = state.mixture.placement.layout
    own: dict[int, str] = {}
    for expert in layout.several:
        if expert in layout.local:
            digest = hashlib.sha256()
            for _, parameter in state.mixture.expert_parameters():
                whole = unpartitioned(parameter)[layout.local.index(expert)]
                digest.update(whole.cpu().numpy().tobytes())
            own[expert] = digest.hexdigest()
        else:
            for _, parameter in state.mixture.expert_parameters():
                unpartitioned(parameter)
    seen: dict[int, set[str]] = {}
    for of_rank in gather_objects(state.world, own):
        for expert, digest_of in of_rank.items():
            seen.setdefault(expert, set()).add(digest_of)
    return [state.mixture.expert_names[e] for e, digests in seen.items() if len(digests) > 1]


def take_copy(runs: Path, name: str, source: str, stage: int, step: int) -> None:
    """A run folder as that of ``source`` was after this step. Rank 0 copies before it looks for the run."""
    if os.environ["RANK"] != "0":
        return
    for path in sorted((runs / source).glob("checkpoints/stage*/step-*")):
        of_stage, at = int(path.parent.name[-1]), int(path.name.split("-")[1])
        if (of_stage, at) <= (stage, step):
            shutil.copytree(path, runs / name / path.relative_to(runs / source))
    for file in ("config.yaml", "metrics.jsonl"):
        shutil.copy2(runs / source / file, runs / name / file)


def expect_failure(loaded: LoadedRecipe, name: str) -> None:
    """The fault ends the run; afterwards the disk has room again."""
    unset_hf_deepspeed_config()
    try:
        train(RunRequest(loaded))
    except SaveError:
        limit_files(None)
        interrupt_steps([], signal.SIGTERM)
        gc.collect()
        return
    raise AssertionError(f"{name}: nothing failed")


def run_case(case: dict[str, Any]) -> None:
    """One run, taken up again after each stop."""
    name, pending = case["name"], [list(stop) for stop in case.get("stop_at", ())]
    loaded = load_recipe(case["recipe"], [*case["overrides"], f"run.name={name}"])
    if "adapters" in case:
        folder = Path(loaded.recipe.run.dir) / case["adapters"] / "mixture"
        names = read_description(folder)[1].experts
        named = ", ".join(f"{{name: {name}, path: {folder}/experts/{name}}}" for name in names)
        loaded = load_recipe(
            case["recipe"], [*case["overrides"], f"run.name={name}", f"mixer.experts=[{named}]"]
        )
    run_module.finish_run = partial(observe, finish=case.get("finish", False))  # type: ignore[assignment]
    loaded, _ = merge_ds_config(loaded)
    check_recipe(loaded)
    interrupt_steps(pending, signal.SIGTERM, LOOPS[case.get("fault")])
    if "take" in case:
        take_copy(Path(loaded.recipe.run.dir), name, *case["take"])
    if case.get("fails"):
        expect_failure(loaded, name)
    for _ in range(len(pending) + 1):
        unset_hf_deepspeed_config()
        try:
            asked = (case.get("start_from"), case.get("allow_changes", False))
            train(RunRequest(loaded, tuple(case.get("stages", (1, 2))), None, *asked))
        except Stopped:
            assert len(case["stop_at"]) > len(pending), "stopped without a signal"
        gc.collect()
    assert not pending, f"{name}: the signals at {pending} never came"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("--local_rank", type=int)
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is never garbage: no case looks through it as it ends
    for case in json.loads(parser.parse_args().cases.read_text()):
        if os.environ["RANK"] == "0":
            print(f"case {case['name']}", flush=True)
        run_case(case)


if __name__ == "__main__":
    main()
