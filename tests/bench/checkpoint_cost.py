"""What saving and taking up again cost, beside a full DeepSpeed checkpoint of the same engine.

    deepspeed --num_accelerators 2 tests/bench/checkpoint_cost.py [--zero 2] [--experts 16] [--times 3]

A Llama of random weights with a pool on q, k, v and o; experts and routers train. Ours is ``save_checkpoint``
of a run, with its checksums and its waiting for the disk, and its way back: checksums of all files, weights,
moments. DeepSpeed's is ``engine.save_checkpoint`` and ``load_checkpoint``, which waits for no disk, checks
nothing, and holds the frozen base as well; ``without the base`` is what it writes with
``exclude_frozen_parameters``. The pool is on every rank: DeepSpeed's checkpoint of experts that are spread
over ranks does not fit stacked banks. Seconds are the median, of the slowest rank.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmixer.checkpoint.retention import Retention
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.training.checkpoints import Checkpoints
from dsmixer.training.engine import StageEngine, start_engine
from dsmixer.training.optimizer import AdamSettings
from dsmixer.training.run_folder import RunFolder
from dsmixer.training.saving import Save, load_weights, restore_optimizer, save_checkpoint
from dsmixer.training.world import World, gather_objects, join_world, once


def main() -> None:
    """Measure and print on rank 0."""
    args = _arguments()
    torch.set_num_threads(1)
    world = join_world(600.0)
    mixture = _mixture(args)
    engine = start_engine(
        mixture,
        [*mixture.expert_parameters(), *mixture.router_parameters()],
        AdamSettings(),
        _ds_config(args.zero, world.size),
    )
    root = Path(once(world, lambda: tempfile.mkdtemp(prefix="checkpoint_cost")))
    try:
        rows = [_ours(world, engine, root / "ours", args.times)]
        for name, excluded in (("DeepSpeed", False), ("DeepSpeed without the base", True)):
            rows.append(_deepspeed(world, engine, root / name, args.times, name, excluded))
    finally:
        gather_objects(world, None)
        if world.rank == 0:
            shutil.rmtree(root)
    if world.rank == 0:
        _print(rows, mixture, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("zero", 2), ("experts", 16), ("rank", 16), ("hidden", 768), ("layers", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--local_rank", type=int)
    return parser.parse_args()


def _mixture(args: argparse.Namespace) -> Mixture:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    experts = [f"domain{e}" for e in range(args.experts)]
    mixer = MixerConfig(targets=["q", "k", "v", "o"], experts=experts, rank=args.rank, alpha=2 * args.rank)
    return attach_mixers(model, mixer)


def _ds_config(zero: int, world_size: int) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero, "contiguous_gradients": True, "reduce_scatter": True},
    }


Row = tuple[str, int, float, float]
"""Name, bytes, seconds to save, seconds to load."""


def _ours(world: World, engine: StageEngine, root: Path, times: int) -> Row:
    folder = RunFolder(root)

    def save() -> None:
        kept = Save(
            folder.checkpoints(1), 1, 100, 200, {"stage1": 8}, 1.0, {"step": 100}, "", None, Retention(1)
        )
        save_checkpoint(world, engine, kept)

    def load() -> None:
        saved = Checkpoints(world, folder, print).open(1)
        assert saved is not None
        load_weights(engine.mixture, saved)
        restore_optimizer(engine, saved)

    return _measured(world, "dsmixer", root, times, save, load)


def _deepspeed(world: World, engine: StageEngine, root: Path, times: int, name: str, excluded: bool) -> Row:
    def save() -> None:
        engine.engine.save_checkpoint(str(root), tag="step", exclude_frozen_parameters=excluded)

    def load() -> None:
        path, _ = engine.engine.load_checkpoint(str(root), tag="step", load_module_strict=not excluded)
        assert path is not None

    return _measured(world, name, root, times, save, load)


def _measured(
    world: World, name: str, root: Path, times: int, save: Callable[[], None], load: Callable[[], None]
) -> Row:
    saving, loading = [], []
    for _ in range(times):
        once(world, lambda: shutil.rmtree(root, ignore_errors=True))
        saving.append(_seconds(world, save))
        loading.append(_seconds(world, load))
    num_bytes = once(world, lambda: sum(p.stat().st_size for p in root.rglob("*") if p.is_file()))
    return name, num_bytes, statistics.median(saving), statistics.median(loading)


def _seconds(world: World, work: Callable[[], None]) -> float:
    gather_objects(world, None)
    began = time.perf_counter()
    work()
    return max(gather_objects(world, time.perf_counter() - began))


def _print(rows: list[Row], mixture: Mixture, args: argparse.Namespace) -> None:
    trained = sum(p.numel() for p in mixture.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in mixture.model.parameters()) - trained
    print(
        f"{dist.get_world_size()} ranks, ZeRO {args.zero}, {trained / 1e6:.1f} M weights train (float32, two "
        f"moments), {frozen / 1e6:.1f} M frozen (bfloat16); bytes that a checkpoint must hold: "
        f"{12 * trained / 1e6:.0f} MB"
    )
    _, own_bytes, own_save, own_load = rows[0]
    for name, num_bytes, save, load in rows:
        print(
            f"{name:28} {num_bytes / 1e6:8.0f} MB ({num_bytes / own_bytes:4.2f}x)  save {save:6.2f} s "
            f"({save / own_save:4.2f}x)  load {load:6.2f} s ({load / own_load:4.2f}x)"
        )


if __name__ == "__main__":
    main()
