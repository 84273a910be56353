"""One rank of ``test_waiting.py``: warm steps of real loops, for each what the host waited for and how many
instructions of the package Python carried out. Prints a line of JSON for each pool.

No GPU is needed to see where a host would wait for one: what would live on the device is followed, from the
weights, the batch and the stage's tables through every operation, by the memory that it lies in; whatever
asks for the value of such a tensor is a wait. A copy to the device is none, and is not seen.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from support.tiny import CONFIGS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import dsmixer
from dsmixer import MixerConfig, attach_mixers
from dsmixer.config.schema import HealthConfig
from dsmixer.config.stages import PreserveConfig, Stage2Config, StageConfig
from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.experts.forms import forms
from dsmixer.experts.grouped import sorted_pairs
from dsmixer.experts.pairs import by_pairs
from dsmixer.model.inject import Mixture
from dsmixer.placement.exchange import token_placement
from dsmixer.placement.groups import expert_parallel_group
from dsmixer.placement.layout import everything_here
from dsmixer.routing.modes import Routing
from dsmixer.training.engine import StageEngine, start_engine
from dsmixer.training.health import StopRequest
from dsmixer.training.loop import Loop, StepReport
from dsmixer.training.optimizer import AdamSettings
from dsmixer.training.stages import HardStage, SoftStage, Stage, expert_lookup
from dsmixer.training.symptoms import Symptoms
from dsmixer.training.world import World, join_world

PACKAGE = str(Path(dsmixer.__file__).parent) + os.sep
TORCH = str(Path(torch.__file__).parent) + os.sep
CHOSEN, ROWS, LENGTH, MICRO_BATCHES, WARM = 8, 2, 32, 2, 3
"""More pairs than experts: fewer would let a form look at the experts that are chosen, and pool by pool at
others."""
CASES = (
    "stage one",
    "frozen",
    "preserve",
    "preserve, all chosen",
    "preserve, all chosen, ZeRO-2",
    "preserve, tokens travel",
)

VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "is_nonzero"}
"""Operators that a device answers with a number or with a shape that depends on numbers."""
UNIQUE = {"_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
METHODS = ("cpu", "tolist", "numpy", "__array__")
"""Of tensors, which no operator carries out on the CPU."""


class Device:
    """The memory that would be a device's, and the waits for it, by place in the program."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self._kept: dict[int, torch.UntypedStorage] = {}

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel():
            storage = tensor.untyped_storage()
            self._kept[storage.data_ptr()] = storage  # kept, so that nothing else comes to lie there
        return tensor

    def move(self, batch: MicroBatch, device: torch.device) -> MicroBatch:
        """In place of ``MicroBatch.to``, which copies nothing from the CPU to the CPU."""
        assert device.type == "cpu"
        return batch._mapped(lambda tensor: self.put(tensor.clone()))

    def has(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._kept

    def waited(self) -> None:
        """At the innermost function that is not torch's."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and (
            frame.f_code.co_filename.startswith(TORCH) or frame.f_code.co_filename == __file__
        ):
            frame = frame.f_back
        place = "here" if frame is None else f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
        self.waits[place.removeprefix(PACKAGE)] += 1


class Operators(TorchDispatchMode):
    """What comes of a tensor on the device is on the device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs or {}))
        here = any(map(self.device.has, given))
        name = func._schema.name.removeprefix("aten::")
        if here and (
            name in VALUES | UNIQUE or (name in ("index", "index_put", "index_put_") and masks(args))
        ):
            self.device.waited()
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found) if here else ():
            if isinstance(tensor, torch.Tensor):
                self.device.put(tensor)
        return found


def masks(args: Any) -> bool:
    """Whether a tensor is indexed by a mask."""
    return any(isinstance(of, torch.Tensor) and of.dtype == torch.bool for of in tree_leaves(args[1]))


class Methods(TorchFunctionMode):
    """Sees those that bring a tensor to the host; a copy on the host is the host's."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in METHODS or not self.device.has(args[0]):
            return found
        self.device.waited()
        with torch._C.DisableTorchFunction():
            return torch.tensor(found.tolist(), dtype=found.dtype) if func is torch.Tensor.cpu else found


@contextmanager
def instructions(into: Counter[str]) -> Iterator[None]:
    """Count what Python carries out of the package's functions: a loop without a call counts as well."""

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        place = f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_code.co_qualname}"
        frame.f_trace_lines, frame.f_trace_opcodes = False, True

        def count(frame: FrameType, event: str, _: Any) -> Any:
            into[place] += event == "opcode"
            return count

        return count

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(None)


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    world = join_world(60.0)
    # what a device takes, where no number can be looked at
    forms["grouped"] = partial(by_pairs, layout=lambda ordered: sorted_pairs(replace(ordered, seen=False)))
    answers.write(json.dumps(control()) + "\n")
    for case in CASES:
        for num_experts in (CHOSEN, 8 * CHOSEN):
            answers.write(json.dumps(measured(case, num_experts, world)) + "\n")
    answers.flush()
    os._exit(0)  # libraries take seconds to say good-bye


def control() -> dict[str, int]:
    """Waits that are seen of each way to ask for a value, on the device; and of all of them on the host."""
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "cpu": torch.Tensor.cpu,
        "tolist": lambda given: given.view(-1)[1:].tolist(),
        "numpy": torch.Tensor.numpy,
        "float": lambda given: float(given.sum()),
        "bool": lambda given: bool((given > 0).all()),
        "nonzero": lambda given: (given > 0).nonzero(),
        "mask": lambda given: given[given > 0],
        "put by a mask": lambda given: given.__setitem__(given > 1, torch.ones(2)),
        "unique": lambda given: given.unique(),
        "equal": lambda given: torch.equal(given, torch.zeros(3)),
        "a number of the host": lambda given: float(given.cpu().sum()),
    }
    found = {}
    for name, way in ways.items():
        device, given = Device(), torch.arange(4.0)
        with Methods(device), Operators(device):
            way(given.clone())
            assert not device.waits, name
            way(device.put(given) * 1)
        found[name] = device.waits.total()
    return found


def measured(case: str, num_experts: int, world: World) -> dict[str, Any]:
    """Instructions and waits of two warm steps of a case."""
    mixture = make_mixture(num_experts, world, travels="travel" in case)
    engine = make_engine(mixture, case)
    device = Device()
    with Methods(device):
        stage = make_stage(mixture, case, device)
    loop = Loop(
        world=world,
        stage=stage,
        engine=engine,
        batch_of=lambda step: make_batch(num_experts, step),
        describe=lambda micro: "",
        stop_request=StopRequest(),
        seed=0,
    )
    watch = Symptoms(HealthConfig(), mixture.expert_names, list(mixture.routers))

    def step(number: int) -> StepReport:
        report = loop.run_step(number)
        assert watch.look(report) == []
        return report

    done: Counter[str] = Counter()
    with mixture.context.routed(stage.routing):
        for number in range(WARM):
            step(number)
        with instructions(done):
            step(WARM)
        for tensor in tensors_of(engine, stage):
            device.put(tensor)
        device.waits.clear()
        with mock.patch.object(MicroBatch, "to", lambda batch, to: device.move(batch, to)):
            with Methods(device), Operators(device):
                report = step(WARM + 1)
    reached = int((engine.optimizer.steps[:-1] == WARM + 2).sum())
    mixture.context.clear()
    engine.release()
    return {
        "case": case,
        "experts": num_experts,
        "reached": reached,
        "chosen": None if report.chosen_E is None else int((report.chosen_E > 0).sum()),
        "dispatches": len(mixture.mixers) * MICRO_BATCHES,
        "waits": device.waits,
        "instructions": done,
    }


def tensors_of(engine: StageEngine, stage: Stage) -> Iterator[torch.Tensor]:
    """What a device holds between two steps."""
    optimizer = engine.optimizer
    yield from engine.mixture.model.parameters()
    yield from engine.mixture.model.buffers()
    for index, shard in enumerate(engine.shards):
        yield from (shard.weights, optimizer.moments.flat("exp_avg", index))
        yield optimizer.moments.flat("exp_avg_sq", index)
    yield from optimizer.origin or ()
    yield optimizer.counted_U
    if isinstance(stage, SoftStage) and stage.usage is not None:
        yield stage.usage


def make_mixture(num_experts: int, world: World, *, travels: bool) -> Mixture:
    """Experts whose B is not zero, and routers that choose among the first eight."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="eager")
    names = [f"expert{e}" for e in range(num_experts)]
    config = MixerConfig(["q", "o"], names, rank=4, alpha=8, compute="grouped")
    placement = None
    if travels:
        placement = token_placement(everything_here(num_experts), expert_parallel_group(1), world.device)
    mixture = attach_mixers(model, config, placement)
    with torch.no_grad():
        for name, parameter in mixture.expert_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.01)
    choose_among_eight(mixture)
    mixture.model.train()
    return mixture


@torch.no_grad()
def choose_among_eight(mixture: Mixture) -> None:
    """Four opposite pairs of directions: for any token four of eight logits are positive, and the others are
    zero, so that the best three are the same whatever the pool holds beside them."""
    for index, router in enumerate(mixture.routers.values()):
        draw = torch.Generator().manual_seed(index)
        half = torch.randn(CHOSEN // 2, router.weight.shape[1], generator=draw)
        router.weight.zero_()
        router.weight[:CHOSEN] = torch.cat((half, -half))


def make_engine(mixture: Mixture, case: str) -> StageEngine:
    trained = [] if case == "frozen" else list(mixture.expert_parameters())
    if case != "stage one":
        trained += mixture.router_parameters()
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "train_batch_size": ROWS * MICRO_BATCHES,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 2 if "ZeRO" in case else 0},
    }
    engine = start_engine(mixture, trained, AdamSettings(clip=1e-3), config)
    if case.startswith("preserve"):
        engine.optimizer.hold_origin()
    return engine


def make_stage(mixture: Mixture, case: str, device: Device) -> Stage:
    """An expert has a domain each."""
    num_experts, cpu = len(mixture.expert_names), torch.device("cpu")
    experts_of, places_of = (device.put(expert_lookup(range(num_experts), cpu)) for _ in range(2))
    if case == "stage one":
        config = StageConfig(learning_rate=1e-7)
        return HardStage(config, 100, num_experts, experts_of, places_of, num_experts)
    experts: Any = case.split(",")[0]
    return SoftStage(
        config=Stage2Config(learning_rate=1e-7, experts=experts, preserve=PreserveConfig(beta=0.1)),
        num_steps=100,
        mixture=mixture,
        routing=Routing(mode="soft") if "all" in case else mixture.config.default_routing(),
        device=cpu,
        num_domains=num_experts,
        expert_of_domain=experts_of,
    )


def make_batch(num_experts: int, step: int) -> StepBatch:
    """Rows of random tokens of the first two domains, the same whatever the pool."""
    draw = torch.Generator().manual_seed(step)
    shape, micros = (ROWS, LENGTH), []
    domains = torch.arange(ROWS)[:, None].expand(shape).contiguous()
    positions = torch.arange(LENGTH).expand(shape).contiguous()
    for _ in range(MICRO_BATCHES):
        ids = torch.randint(3, 200, shape, generator=draw)
        micros.append(MicroBatch(ids, ids, positions, domains, domains, ids.numel(), ids.numel() - ROWS))
    targets = torch.zeros(num_experts, dtype=torch.int64)
    targets[:ROWS] = MICRO_BATCHES * (LENGTH - 1)
    return StepBatch(micros, targets, MICRO_BATCHES * ROWS * LENGTH)


if __name__ == "__main__":
    main()
