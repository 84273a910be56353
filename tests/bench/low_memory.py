"""Memory and speed of a training step on one device: the mixture, and PEFT's LoRA of the same rank beside it.

    python tests/bench/low_memory.py --shape llama3_8b --base nf4     # a GPU of 24 GB
    python tests/bench/low_memory.py --shape llama3_8b --base bf16
    python tests/bench/low_memory.py                                  # a small Llama on the CPU

The base has random weights: nothing is downloaded, and bytes and times do not depend on them. Six experts
of rank 64 on q, k, v and o, rows of 1,024 tokens one at a time, layers checkpointed, K = 3. Each case is a
process of its own, with the engine (ZeRO-0), the loop and the stages of a real run:

- ``stage one``, ``preserve``: float32 AdamW; in stage two with theta(0) of the preserve term;
- ``preserve, 8-bit``: 8-bit AdamW, theta(0) on the host;
- ``frozen``: routers alone;
- ``one LoRA``: PEFT's LoRA with one adapter on the same projections, torch's AdamW, the same checkpointing
  and the same chunked cross-entropy.

Columns, in bytes of the device: what stays (base, experts, gradients, moments, theta(0)); ``activations``:
the peak of the steps less what stays; ``peak``: the most that was allocated while training; ``plan``: what
``dsmixer plan`` predicts for it. On the CPU nobody counts allocations: there, activations are what autograd
keeps of a micro-batch without what is made and freed again, and the peak is their sum with what stays, so
that the plan, which counts both, is above it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dsmixer.config.stages import PreserveConfig, Stage2Config, StageConfig
from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.losses.task import token_losses
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.load import checkpoint_activations
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.quantized import freeze_packed
from dsmixer.model.shape import model_shape
from dsmixer.placement.memory import Layout, RankBytes, rank_bytes
from dsmixer.placement.owners import Owners
from dsmixer.placement.request import Cluster, ModelShape, PlanRequest, Pool, StageShape
from dsmixer.training.engine import StageEngine, start_engine
from dsmixer.training.health import StopRequest
from dsmixer.training.loop import Loop
from dsmixer.training.stage_run import adam_settings, trainable
from dsmixer.training.stages import HardStage, SoftStage, Stage, expert_lookup
from dsmixer.training.world import World, join_world

SHAPES: dict[str, dict[str, int]] = {
    "llama3_8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 16032,
    },
}
TARGETS = ("q", "k", "v", "o")
CASES = ("stage one", "preserve", "preserve, 8-bit", "frozen", "one LoRA")
COLUMNS = ("base", "experts", "gradients", "moments", "origin", "activations", "peak", "plan")
ACCUMULATION = 2


@dataclass
class Measured:
    """Bytes on the device, tokens a second, and the peak that the plan predicts."""

    base: int = 0
    experts: int = 0
    gradients: int = 0
    moments: int = 0
    origin: int = 0
    activations: int = 0
    peak: int = 0
    plan: int = 0
    tokens_per_second: float = 0.0

    @property
    def held(self) -> int:
        return self.base + self.experts + self.gradients + self.moments + self.origin


def base_config(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(**SHAPES[args.shape], max_position_embeddings=args.length)


def random_base(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """A Llama of random weights on the device, in bfloat16 or NF4 with double quantisation."""
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(base_config(args), dtype=torch.bfloat16)
    if args.base == "nf4":
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        for name in names:
            if name != "lm_head":
                linear: Any = model.get_submodule(name)
                model.set_submodule(name, four_bit(linear, device))
    checkpoint_activations(model)
    return model


def four_bit(linear: nn.Linear, device: torch.device) -> nn.Module:
    """The layer in NF4, as transformers loads it; for ours ``freeze_packed`` follows, as in a run."""
    storage: dict[str, Any] = {"quant_type": "nf4", "quant_storage": torch.bfloat16}
    quantized = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        device="meta",
        **storage,
    )
    quantized.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, module=quantized, **storage
    ).to(device)
    return quantized


def stage_config(case: str) -> StageConfig:
    """The recipe's section of a case."""
    if case == "stage one":
        return StageConfig()
    if case == "frozen":
        return Stage2Config(experts="frozen")
    if case == "preserve, 8-bit":
        return Stage2Config(optimizer="adamw_8bit", preserve=PreserveConfig(origin="host"))
    return Stage2Config()


def make_stage(config: StageConfig, mixture: Mixture, device: torch.device) -> Stage:
    num_experts = len(mixture.expert_names)
    if not isinstance(config, Stage2Config):
        own = expert_lookup(range(num_experts), device)
        return HardStage(config, 1000, num_experts, own, own, num_experts)
    return SoftStage(
        config=config,
        num_steps=1000,
        mixture=mixture,
        routing=mixture.config.default_routing(),
        device=device,
        num_domains=num_experts,
        expert_of_domain=expert_lookup(range(num_experts), device),
    )


def make_batch(args: argparse.Namespace, step: int) -> StepBatch:
    """Micro-batches of random tokens, each of one domain after the other."""
    draw = torch.Generator().manual_seed(step)
    targets = torch.zeros(args.experts, dtype=torch.int64)
    micros = []
    for number in range(ACCUMULATION):
        shape = (1, args.length)
        ids = torch.randint(SHAPES[args.shape]["vocab_size"], shape, generator=draw)
        domain = (ACCUMULATION * step + number) % args.experts
        targets[domain] += args.length - 1
        domains = torch.full(shape, domain)
        places = torch.arange(args.length)[None]
        micros.append(MicroBatch(ids, ids, places, domains, domains, args.length, args.length - 1))
    return StepBatch(micros, targets, ACCUMULATION * args.length)


def ds_config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 0},
    }


def of_mixture(case: str, args: argparse.Namespace, world: World) -> Measured:
    """A case of ours."""
    with torch.device("meta"):
        shape = model_shape(AutoModelForCausalLM.from_config(base_config(args)), TARGETS)
    model, found = random_base(args, world.device), Measured()
    if args.base == "nf4":
        freeze_packed(model, torch.bfloat16)
    found.base = tensor_bytes(model)
    names = [f"expert{number}" for number in range(args.experts)]
    config = MixerConfig(
        TARGETS, names, rank=args.rank, alpha=2 * args.rank, dropout=args.dropout, top_k=min(3, args.experts)
    )
    mixture = attach_mixers(model, config)
    found.experts = tensor_bytes(model) - found.base
    stage_of_recipe = stage_config(case)
    trained = trainable(mixture, stage_of_recipe)
    engine = start_engine(mixture, trained, adam_settings(stage_of_recipe), ds_config())
    if isinstance(stage_of_recipe, Stage2Config) and stage_of_recipe.experts == "preserve":
        engine.optimizer.hold_origin()
    found.gradients = sum(p.numel() * p.element_size() for _, p in trained)
    found.moments, found.origin = state_bytes(engine, world.device)
    found.plan = predicted(shape, args, stage_of_recipe, engine.mixture).peak
    model.train()
    loop = Loop(
        world=world,
        stage=make_stage(stage_of_recipe, mixture, world.device),
        engine=engine,
        batch_of=lambda step: make_batch(args, step),
        describe=lambda micro: "",
        stop_request=StopRequest(),
        seed=0,
    )
    with mixture.context.routed(loop.stage.routing):
        run_steps(args, world.device, found, loop.run_step)
    return found


def of_one_lora(args: argparse.Namespace, world: World) -> Measured:
    """PEFT's LoRA with one adapter."""
    found, model = Measured(), random_base(args, world.device)
    found.base = tensor_bytes(model)
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
        target_modules=[f"{target}_proj" for target in TARGETS],
    )
    peft = get_peft_model(model, lora, autocast_adapter_dtype=True)
    peft.enable_input_require_grads()
    found.experts = tensor_bytes(peft) - found.base
    trained = [p for p in peft.parameters() if p.requires_grad]
    found.gradients = sum(p.numel() * p.element_size() for p in trained)
    found.moments = 2 * found.gradients
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    peft.train()

    def step(number: int) -> None:
        batch = make_batch(args, number)
        for micro in batch.micro_batches:
            micro = micro.to(world.device)
            logits = peft(micro.input_ids, position_ids=micro.position_ids, use_cache=False).logits
            (token_losses(logits, micro.labels).sum() / batch.real_tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    run_steps(args, world.device, found, step)
    return found


def run_steps(args: argparse.Namespace, device: torch.device, found: Measured, step: Any) -> None:
    """Warm up, then time; fills activations, peak and tokens a second."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with kept_tensors() as kept:
        step(0)
    seconds = []
    for number in range(1, args.steps + 1):
        began = time.perf_counter()
        step(number)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    found.tokens_per_second = ACCUMULATION * args.length / statistics.median(seconds)
    if on_gpu:
        found.peak = torch.cuda.max_memory_allocated()
        found.activations = found.peak - found.held
    else:
        found.activations = kept.most // ACCUMULATION
        found.peak = found.held + found.activations


class Kept:
    """Bytes that autograd keeps, each piece of memory once; parameters aside."""

    def __init__(self) -> None:
        self.most = 0
        self._seen: set[int] = set()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.most += storage.nbytes()
        return tensor


@contextmanager
def kept_tensors() -> Iterator[Kept]:
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        yield kept


def tensor_bytes(model: nn.Module) -> int:
    """Parameters and buffers, with what a 4-bit weight keeps beside itself."""
    total = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner = state.state2
            tensors = (state.absmax, state.code, state.offset, inner.absmax, inner.code)
            total += sum(t.numel() * t.element_size() for t in tensors)
    return total


def state_bytes(engine: StageEngine, device: torch.device) -> tuple[int, int]:
    """Moments and theta(0) on the device."""
    optimizer = engine.optimizer
    origin = sum(t.nbytes for t in optimizer.origin or () if t.device == device)
    if optimizer.settings.origin_on_host:
        origin = 0
    return optimizer.moments.num_bytes(), origin


def predicted(
    shape: ModelShape, args: argparse.Namespace, config: StageConfig, mixture: Mixture
) -> RankBytes:
    """What ``dsmixer plan`` says of the case."""
    second = config if isinstance(config, Stage2Config) else None
    stage = StageShape(
        name="case",
        rows=1,
        max_length=args.length,
        accumulation=ACCUMULATION,
        trains_experts=second is None or second.experts == "preserve",
        trains_routers=second is not None,
        keeps_origin=second is not None and second.experts == "preserve",
        top_k=None if second is None else mixture.config.top_k,
        eight_bit=config.optimizer.endswith("8bit"),
        origin_on_host=second is not None and second.preserve.origin == "host",
    )
    request = PlanRequest(
        model=shape,
        pool=Pool((args.rank,) * args.experts, (1.0,) * args.experts),
        cluster=Cluster(1),
        stages=(stage,),
        four_bit=args.base == "nf4",
        checkpointing=True,
        dropout=args.dropout > 0,
        zero_stage=0,
    )
    everywhere = Owners(tuple(((0, 1.0),) for _ in range(args.experts)), (1.0,))
    return rank_bytes(request, Layout("replicate", 0, everywhere), stage)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--base", choices=("nf4", "bf16"), default="nf4")
    parser.add_argument("--experts", type=int, default=6)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--case", choices=CASES, help="one case in this process, as JSON on the last line")
    return parser.parse_args()


def one_case(args: argparse.Namespace) -> None:
    world = join_world(60.0)
    found = of_one_lora(args, world) if args.case == "one LoRA" else of_mixture(args.case, args, world)
    print(json.dumps(asdict(found)))


def all_cases(args: argparse.Namespace) -> None:
    """Each case in a process of its own; a table."""
    found: dict[str, dict[str, float]] = {}
    for case in CASES:
        command = [sys.executable, *sys.argv, "--case", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
    beside = found["one LoRA"]["tokens_per_second"]
    title = f"{args.shape}, {args.base}, {args.experts} experts of rank {args.rank}, {args.length} tokens"
    table = Table(title=f"{title}; GB", title_justify="left")
    for column in ("", *COLUMNS, "plan / peak", "tokens/s", "of one LoRA's"):
        table.add_column(column, justify="right" if column else "left")
    for case, row in found.items():
        sizes = [f"{row[column] / 1e9:.3f}" if row[column] else "" for column in COLUMNS]
        ratio = f"{row['plan'] / row['peak']:.3f}" if row["plan"] else ""
        speed = row["tokens_per_second"]
        table.add_row(case, *sizes, ratio, f"{speed:,.0f}", f"{speed / beside:.2f}")
    Console(width=160).print(table)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    given = parse()
    one_case(given) if given.case else all_cases(given)
