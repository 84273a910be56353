"""One rank of ``dist/test_plan_bytes.py``: real engines, and the bytes of all tensors alive at some points.

``made``: the most while the mixers are made. ``loaded``: model and mixers, before the engine. ``engine``:
with the engine and its optimizer. ``accumulated``: after the first of two micro-batches. ``backward``: after
the second, before the optimizer's step. Beside them ``weights``: what the model's parameters keep when
nothing is gathered.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmixer.experts.bank import ExpertBank
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.placement.exchange import token_placement
from dsmixer.placement.groups import cut_weights, expert_parallel_group
from dsmixer.placement.layout import ExpertLayout
from dsmixer.training.engine import start_engine
from dsmixer.training.moments import Keep
from dsmixer.training.optimizer import AdamSettings

BUCKET = 8192
LONG = os.environ.get("DSMIXER_LONG") == "1"
CASES = [
    *((stage, "all") for stage in (0, 2, 3)),
    (3, "routers"),
    *([(1, "all"), *((stage, "experts") for stage in range(4)), (2, "routers")] if LONG else []),
]
SPREAD = {
    "ep4": ((0, 1), (1,), (2,), (3, 4)),
    "ep2": ((0, 1), (1, 2, 3, 4)),
}
"""Experts of the ranks of a group: some hold more than others, and one expert has several owners."""
SPREAD_STAGES = (1, 2, 3) if LONG else (1, 3)
ELSEWHERE = {
    "offload1": (1, AdamSettings(), ("offload_optimizer",)),
    "offload2": (2, AdamSettings(), ("offload_optimizer",)),
    "offload3": (3, AdamSettings(), ("offload_optimizer", "offload_param")),
    "eight_bit1": (1, AdamSettings(keep=Keep("8bit")), ()),
    "eight_bit3": (3, AdamSettings(keep=Keep("8bit")), ()),
}
if not LONG:
    ELSEWHERE = {name: ELSEWHERE[name] for name in ("offload3", "eight_bit3")}
"""ZeRO stage, optimizer and what DeepSpeed keeps on the host; of all that trains in stage two."""
EXPERTS = ("a", "b", "c", "d", "e")
MIXER: dict[str, Any] = {"targets": ["q", "k", "v", "o"], "experts": EXPERTS, "rank": 8, "top_k": 2}


def llama_config() -> LlamaConfig:
    """Wide enough that weights outweigh what an engine keeps for itself."""
    return LlamaConfig(
        vocab_size=260,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


def live_bytes(*models: nn.Module) -> int:
    """Bytes of all tensors alive in this process, each piece of memory once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    for parameter in [p for model in models for p in model.parameters()]:
        tensors.append(parameter.data)
        if parameter.grad is not None:
            tensors.append(parameter.grad)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta
    }
    return sum(storages.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters on this rank, as DeepSpeed keeps them."""
    return sum(p.numel() * p.element_size() for p in map(kept_part, model.parameters()))


def kept_part(parameter: nn.Parameter) -> torch.Tensor:
    part: torch.Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return part


def new_mixture(owned: tuple[tuple[int, ...], ...] | None, stage: int, watched: bool) -> tuple[Mixture, int]:
    """A mixture as a run makes it, and, if that is watched, the most bytes alive when ZeRO-3 cut a bank or
    router."""
    model = AutoModelForCausalLM.from_config(llama_config(), dtype=torch.float32)
    placement = None
    if owned is not None:
        layout = ExpertLayout(owned, dist.get_rank() % len(owned))
        placement = token_placement(layout, expert_parallel_group(len(owned)), "cpu")
    most = 0

    def settle(path: str, module: nn.Module) -> None:
        nonlocal most
        if stage == 3:
            most = max(most, live_bytes(model)) if watched else 0  # to look costs more than to make
            experts_over = len(owned) if owned and isinstance(module, ExpertBank) else 1
            cut_weights(module, ds_config(3, 2), experts_over=experts_over)

    return attach_mixers(model, MixerConfig(**MIXER), placement, settle), most


def ds_config(stage: int, accumulation: int, offload: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 200,
            **{key: {"device": "cpu"} for key in offload},
        },
    }


def measure(
    stage: int,
    trained: str,
    owned: tuple[tuple[int, ...], ...] | None = None,
    settings: AdamSettings | None = None,
    offload: Sequence[str] = (),
) -> dict[str, int]:
    before = live_bytes()
    plain = owned is None and settings is None and trained == "all"
    mixture, most = new_mixture(owned, stage, watched=plain)
    experts, routers = list(mixture.expert_parameters()), list(mixture.router_parameters())
    parameters = {"experts": experts, "all": [*experts, *routers], "routers": routers}[trained]
    found = {"made": most - before, "loaded": live_bytes(mixture.model) - before}
    started = start_engine(mixture, parameters, settings or AdamSettings(), ds_config(stage, 2, offload))
    if trained == "all":
        started.optimizer.hold_origin()
    found["engine"] = live_bytes(mixture.model) - before
    found["weights"] = weight_bytes(mixture.model)
    ids = torch.arange(12)[None]
    for i in range(2):
        started.engine.backward(started.engine(input_ids=ids, use_cache=False).logits.square().mean())
        if i == 0:
            started.engine.step()
            found["accumulated"] = live_bytes(mixture.model) - before
    dist.barrier()  # until then gloo may hold on to what it has reduced last
    found["backward"] = live_bytes(mixture.model) - before
    started.release()
    return found


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what the imports left need not be looked through again and again
    found = {f"zero{stage}_{trained}": measure(stage, trained) for stage, trained in CASES}
    for name, owned in SPREAD.items():
        for stage in SPREAD_STAGES:
            found[f"zero{stage}_{name}"] = measure(stage, "all", owned)
    for name, (stage, settings, offload) in ELSEWHERE.items():
        found[name] = measure(stage, "all", settings=settings, offload=offload)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
