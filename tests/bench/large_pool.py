"""What a step costs with 1,024 experts, beside the same step with 8.

    deepspeed --num_accelerators 4 tests/bench/large_pool.py [--short] [--zero 3] [--router per_projection]

A Llama of random weights with a pool of rank-8 experts on q, k, v and o, in ``tokens`` mode: a rank holds its
quarter of the pool. Both pools live in the same processes and step in turn, with the engine, the loop and the
stages of a real run. The cases:

- ``stage one``: a batch of eight domains, two owned by each rank, drawn anew each step;
- ``frozen``, ``preserve``: stage two, K = 3 of E, routers as they start: of 1,024 experts a batch chooses
  nearly all, of 8 at most 8;
- ``frozen, eight chosen``, ``preserve, eight chosen``: routers by which every token chooses among the same
  eight experts, two a rank, in both pools: as many chosen experts, another pool.

The columns, milliseconds a step and rank:

- base: the frozen model, forward and backward;
- router: product, softmax, top-k, routing loss, statistics and their reduction, and the routers' own update;
- mixers: the forms' arithmetic on the chosen pairs, with the gathering of chosen experts;
- exchange: all-to-all and its index work;
- optimizer: norms, preserve and the update of the experts that the step reached;
- bank passes: zeros for gradients of the banks' shape, and DeepSpeed's reduction, copies and flat buffers;
- other: the rest of the loop. Waiting for other ranks is in no column.

``m+e+o`` is mixers + exchange + optimizer. Times are processor time of a rank with all its threads, so that
ranks which share cores do not count each other's work: the mean over ranks, then the median over steps. The
last column is the wall time of a step.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmixer.config.stages import Stage2Config, StageConfig
from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.experts import chosen
from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.placement.exchange import Dispatched, TokenExchange, token_placement
from dsmixer.placement.groups import expert_parallel_group, full_shape
from dsmixer.placement.layout import ExpertLayout
from dsmixer.routing.context import RoutingContext
from dsmixer.routing.router import Router
from dsmixer.training.engine import StageEngine, start_engine
from dsmixer.training.health import StopRequest
from dsmixer.training.loop import Loop
from dsmixer.training.optimizer import AdamSettings, ExpertAdamW
from dsmixer.training.stages import HardStage, SoftStage, Stage, expert_lookup
from dsmixer.training.world import World, join_world

VOCABULARY = 512
CHOSEN = 8  # experts of a batch, where the case says so
COLUMNS = ("base", "router", "mixers", "exchange", "optimizer", "bank passes", "other")
FOLLOWING = ("mixers", "exchange", "optimizer")  # what has to follow the chosen experts and not the pool
CASES = ("stage one", "frozen", "preserve", "frozen, eight chosen", "preserve, eight chosen")


class Clock:
    """Processor time by column; a column inside another one stops the outer one meanwhile."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._open = ["other"]
        self._since = time.process_time()
        self._nodes: set[Any] = set()

    def _charge(self) -> None:
        now = time.process_time()
        self.spent[self._open[-1]] += now - self._since
        self._since = now

    def begin(self, column: str) -> None:
        self._charge()
        self._open.append(column)

    def end(self) -> None:
        self._charge()
        self._open.pop()

    @contextmanager
    def column(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def take(self) -> dict[str, float]:
        """The times since the last call, in seconds."""
        self._charge()
        spent, self.spent, self._nodes = self.spent, defaultdict(float), set()
        return spent

    def time_backward(self, column: str, outputs: Sequence[Any], inputs: Sequence[Any]) -> None:
        """Charge the backward pass of what lies between inputs and outputs to a column."""
        ends = {tensor.grad_fn for tensor in inputs if tensor is not None}
        for node in nodes_behind(outputs, ends | self._nodes):
            self._nodes.add(node)
            node.register_prehook(functools.partial(self._switch, column))

    def time_rest(self, objective: torch.Tensor) -> None:
        """Charge what is left of a backward pass to the base."""
        for node in nodes_behind((objective,), set()):
            if node not in self._nodes:
                node.register_prehook(functools.partial(self._switch, "base"))

    def _switch(self, column: str, grads: Any) -> None:
        """A node begins; the one before it had all until now, the engine's sums of its gradients included."""
        self._charge()
        self._open[-1] = column


def nodes_behind(outputs: Sequence[Any], ends: set[Any]) -> list[Any]:
    """The autograd nodes between ``outputs`` and ``ends``, without leaves, which run within another node."""
    found: dict[Any, None] = {}
    left = [tensor.grad_fn for tensor in outputs if tensor is not None]
    while left:
        node = left.pop()
        if node is None or node in ends or node in found or hasattr(node, "variable"):
            continue
        found[node] = None
        left.extend(source for source, _ in node.next_functions)
    return list(found)


def timed(clock: Clock, owner: Any, name: str, column: str | Callable[..., str]) -> None:
    """Charge every call of a function to a column, which its arguments may decide."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.column(column if isinstance(column, str) else column(*args, **kwargs)):
            return real(*args, **kwargs)

    setattr(owner, name, call)


def time_the_package(clock: Clock) -> None:
    """Put the clock around the parts of a step that are the same for every engine."""
    _time_forward(clock)
    _time_exchange(clock)
    timed(clock, chosen, "empty_gradient", "bank passes")
    for name in ("measure", "prepare", "step"):
        timed(clock, ExpertAdamW, name, "optimizer")
    timed(clock, Loop, "_reduce", lambda loop, sums, seen: "other" if seen is None else "router")


def _time_forward(clock: Clock) -> None:
    """The routers and the banks, with their backward passes."""
    choose, compute = RoutingContext._through_router, ExpertBank.forward

    def through_router(context: RoutingContext, router: Router, index: int, x_TD: torch.Tensor) -> Assignment:
        with clock.column("router"):
            assignment = choose(context, router, index, x_TD)
        outputs = (assignment.weights_TK, assignment.gate_TE, context._loss_sum)
        clock.time_backward("router", outputs, (x_TD,))
        return assignment

    def forward(bank: ExpertBank, x_TD: torch.Tensor, assignment: Assignment) -> torch.Tensor:
        with clock.column("mixers"):
            y_TO = compute(bank, x_TD, assignment)
        clock.time_backward("mixers", (y_TO,), (x_TD, assignment.weights_TK, assignment.gate_TE))
        return y_TO

    RoutingContext._through_router = through_router  # type: ignore[method-assign]
    ExpertBank.forward = forward  # type: ignore[method-assign]


def _time_exchange(clock: Clock) -> None:
    """Dispatch and combine with their backward passes; ranks meet before each all-to-all, in no column."""
    send, bring = TokenExchange.dispatch, TokenExchange.combine

    def dispatch(exchange: TokenExchange, x_TD: torch.Tensor, assignment: Assignment) -> Dispatched:
        with clock.column("exchange"):
            sent = send(exchange, x_TD, assignment)
        outputs, inputs = (sent.x_MD, sent.assignment.weights_TK), (x_TD, assignment.weights_TK)
        clock.time_backward("exchange", outputs, inputs)
        return sent

    def combine(exchange: TokenExchange, y_MO: torch.Tensor, sent: Dispatched) -> torch.Tensor:
        with clock.column("exchange"):
            y_TO = bring(exchange, y_MO, sent)
        clock.time_backward("exchange", (y_TO,), (y_MO,))
        return y_TO

    TokenExchange.dispatch = dispatch  # type: ignore[method-assign]
    TokenExchange.combine = combine  # type: ignore[method-assign]
    all_to_all = dist.all_to_all_single

    def meet_first(*args: Any, **kwargs: Any) -> Any:
        with clock.column("waiting"):
            dist.barrier(kwargs.get("group"))
        return all_to_all(*args, **kwargs)

    dist.all_to_all_single = meet_first


def time_the_engine(clock: Clock, engine: Any) -> None:
    """Put the clock around an engine: the model's passes, and what DeepSpeed does with flat buffers."""
    timed(clock, engine, "forward", "base")
    timed(clock, engine, "step", "bank passes")
    backward = engine.backward

    def through(objective: torch.Tensor, **kwargs: Any) -> Any:
        clock.time_rest(objective)
        with clock.column("base"):
            return backward(objective, **kwargs)

    engine.backward = through
    zero = engine.optimizer
    names = (
        "process_gradients",
        "overlapping_partition_gradients_reduce_epilogue",
        "reduce_ready_partitions_and_remove_grads",
        "independent_gradient_partition_epilogue",
    )
    for name in names:
        if hasattr(zero, name):
            timed(clock, zero, name, "bank passes")


@dataclass(frozen=True)
class Pool:
    """A mixture with its engine, ready to step through a case."""

    mixture: Mixture
    engine: StageEngine
    loop: Loop


def layout_of(num_experts: int, world: World) -> ExpertLayout:
    """Equal runs of the pool."""
    each = num_experts // world.size
    runs = tuple(tuple(range(rank * each, (rank + 1) * each)) for rank in range(world.size))
    return ExpertLayout(runs, world.rank)


def make_mixture(args: argparse.Namespace, num_experts: int, world: World) -> Mixture:
    """The same small Llama whatever the pool; experts whose B is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=args.length,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = [f"expert{e}" for e in range(num_experts)]
    mixer = MixerConfig(["q", "k", "v", "o"], names, rank=8, alpha=16, router=args.router)
    layout = layout_of(num_experts, world)
    mixture = attach_mixers(model, mixer, token_placement(layout, expert_parallel_group(world.size), "cpu"))
    with torch.no_grad():
        for name, parameter in mixture.expert_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.01)
    return mixture


@torch.no_grad()
def choose_among(mixture: Mixture, eight: list[int]) -> None:
    """Routers by which every token's three best are among eight experts: four opposite pairs of directions,
    so that four of the eight logits are positive for any token, and zero for all other experts."""
    for index, router in enumerate(mixture.routers.values()):
        draw = torch.Generator().manual_seed(index)
        half = torch.randn(len(eight) // 2, router.weight.shape[1], generator=draw)
        router.weight.zero_()
        router.weight[eight] = torch.cat((half, -half)) / router.weight.shape[1] ** 0.5


def ds_config(zero_stage: int, args: argparse.Namespace, world: World) -> dict[str, Any]:
    sizes: dict[str, Any] = {"reduce_bucket_size": 2**25}
    if zero_stage < 3:
        sizes["allgather_bucket_size"] = 2**25
    return {
        "train_micro_batch_size_per_gpu": args.rows,
        "gradient_accumulation_steps": 1,
        "train_batch_size": args.rows * world.size,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "contiguous_gradients": True,
            "reduce_scatter": True,
            **sizes,
            "stage": zero_stage,
        },
    }


def make_stage(case: str, mixture: Mixture) -> Stage:
    """The stage of a case, as a run makes it; each expert has a domain."""
    num_experts, device = len(mixture.expert_names), torch.device("cpu")
    if case == "stage one":
        config = StageConfig(learning_rate=1e-4)
        place_of = {expert: place for place, expert in enumerate(mixture.placement.layout.local)}
        places = [place_of.get(expert, -1) for expert in range(num_experts)]
        domains = expert_lookup(range(num_experts), device)
        return HardStage(config, 1000, num_experts, domains, expert_lookup(places, device), len(place_of))
    experts: Any = case.split(",")[0]
    return SoftStage(
        config=Stage2Config(learning_rate=1e-6, experts=experts),
        num_steps=1000,
        mixture=mixture,
        routing=mixture.config.default_routing(),
        device=device,
        num_domains=num_experts,
        expert_of_domain=expert_lookup(range(num_experts), device),
    )


def make_pool(case: str, args: argparse.Namespace, num_experts: int, world: World, clock: Clock) -> Pool:
    """Model, engine and stage of a case; the eight experts of ``choose_among`` are two a rank."""
    mixture = make_mixture(args, num_experts, world)
    each = num_experts // world.size
    eight = [rank * each + i for i in range(CHOSEN // world.size) for rank in range(world.size)]
    if case.endswith("eight chosen"):
        choose_among(mixture, eight)
    trainable = [] if case.startswith("frozen") else list(mixture.expert_parameters())
    if case != "stage one":
        trainable += mixture.router_parameters()
    engine = start_engine(mixture, trainable, AdamSettings(), ds_config(args.zero, args, world))
    if case.startswith("preserve"):
        engine.optimizer.hold_origin()
    time_the_engine(clock, engine.engine)
    mixture.model.train()
    loop = Loop(
        world=world,
        stage=make_stage(case, mixture),
        engine=engine,
        batch_of=lambda step: make_batch(args, num_experts, step, world),
        describe=lambda micro: "",
        stop_request=StopRequest(),
        seed=0,
    )
    return Pool(mixture, engine, loop)


def make_batch(args: argparse.Namespace, num_experts: int, step: int, world: World) -> StepBatch:
    """Rows of random tokens; a rank's rows are of two of its domains, which differ from step to step."""
    shape, each = (args.rows, args.length), num_experts // world.size
    draw = torch.Generator().manual_seed(100 * step)
    places = torch.stack([torch.randperm(each, generator=draw)[:2] for _ in range(world.size)])
    domains = places + each * torch.arange(world.size)[:, None]
    own = domains[world.rank].repeat_interleave(args.rows // 2)
    tokens = torch.Generator().manual_seed(100 * step + world.rank + 1)
    input_ids = torch.randint(VOCABULARY, shape, generator=tokens)
    position_ids = torch.arange(args.length).expand(shape).contiguous()
    domain_ids = own[:, None].expand(shape).contiguous()
    micro = MicroBatch(
        input_ids, input_ids, position_ids, domain_ids, domain_ids, input_ids.numel(), input_ids.numel()
    )
    targets = torch.zeros(num_experts, dtype=torch.int64)
    targets[domains.flatten()] = args.rows // 2 * (args.length - 1)
    return StepBatch([micro], targets, input_ids.numel() * world.size)


def measure(pools: dict[int, Pool], args: argparse.Namespace, clock: Clock) -> dict[int, dict[str, float]]:
    """Step the pools in turn; medians over steps of the means over ranks, in ms, and the chosen experts."""
    steps: dict[int, list[dict[str, float]]] = {size: [] for size in pools}
    for step in range(args.warmup + args.steps):
        for size, pool in pools.items():
            gc.collect()
            gc.disable()
            dist.barrier()
            clock.take()
            with pool.mixture.context.routed(pool.loop.stage.routing):
                report = pool.loop.run_step(step)
            spent = clock.take()
            gc.enable()
            if step >= args.warmup:
                steps[size].append(row_of(spent, report.seconds, chosen_of(pool, report)))
    return {
        size: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for size, rows in steps.items()
    }


def chosen_of(pool: Pool, report: Any) -> float:
    """Experts that a batch chose, mean over routers."""
    if report.statistics is None:
        return CHOSEN
    return (report.statistics.chosen_ME > 0).sum(1).float().mean().item()


def row_of(spent: dict[str, float], seconds: float, chosen: float) -> dict[str, float]:
    """One step of all ranks."""
    values = torch.tensor([spent[column] * 1e3 for column in COLUMNS] + [seconds * 1e3])
    dist.all_reduce(values)
    values /= dist.get_world_size()
    row = dict(zip((*COLUMNS, "wall"), values.tolist(), strict=True))
    return row | {"m+e+o": sum(row[column] for column in FOLLOWING), "chosen": chosen}


def show(case: str, rows: dict[int, dict[str, float]]) -> None:
    """A table of the two pools and their ratios."""
    names = (*COLUMNS, "m+e+o", "wall")
    print(f"\n{case}: " + ", ".join(f"{row['chosen']:.0f} of {size:,}" for size, row in rows.items()))
    print("experts " + "".join(f"{name:>13s}" for name in names))
    for size, row in rows.items():
        print(f"{size:7,d} " + "".join(f"{row[name]:13.2f}" for name in names))
    small, large = rows[min(rows)], rows[max(rows)]
    ratios = [large[name] / small[name] if small[name] > 0.005 else float("nan") for name in names]
    print("ratio   " + "".join(f"{ratio:13.2f}" for ratio in ratios), flush=True)


def expert_bytes(mixture: Mixture) -> tuple[int, int]:
    """Bytes of experts that this rank holds, and of the whole pool."""
    own = sum(math.prod(full_shape(p)) * p.element_size() for _, p in mixture.expert_parameters())
    each = own // len(mixture.placement.layout.local)
    return own, each * len(mixture.expert_names)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a narrower model and fewer steps")
    parser.add_argument("--large", type=int, default=1024, help="experts of the large pool")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, help="tokens a row")
    parser.add_argument("--rows", type=int, default=2, help="rows of a rank, an even number")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--router", default="per_block", choices=("per_block", "per_projection"))
    parser.add_argument("--zero", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.hidden = args.hidden or (256 if args.short else 512)
    args.length = args.length or (512 if args.short else 1024)
    args.steps = args.steps or (5 if args.short else 9)
    return args


def main() -> None:
    """Measure every case and print its table on rank 0."""
    args = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = join_world(600.0)
    clock = Clock()
    time_the_package(clock)
    if world.rank == 0:
        print(
            f"D={args.hidden}, {args.layers} layers, {args.rows} x {args.length} tokens a rank, r=8, K=3, "
            f"{args.router} routers, ZeRO-{args.zero}, {world.size} ranks, median of {args.steps} steps"
        )
    for number, case in enumerate(args.cases):
        pools = {size: make_pool(case, args, size, world, clock) for size in (CHOSEN, args.large)}
        if number == 0 and world.rank == 0:
            own, every = expert_bytes(pools[args.large].mixture)
            print(f"expert bytes a rank: {own:,} of {every:,}, {own / every:.3f}")
        rows = measure(pools, args, clock)
        if world.rank == 0:
            show(case, rows)
        for pool in pools.values():
            pool.mixture.context.clear()
            pool.engine.release()
        del pools
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
