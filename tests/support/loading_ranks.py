"""One rank of ``dist/test_loading_peak.py``: the host's memory while a base is loaded, and what is kept.

Of a large base the bytes of anonymous memory (``RssAnon``) beyond those before: at most while it loads, and
afterwards; and, apart from them, the most of the mapped checkpoint (``RssFile``), which the kernel can drop.
Of a small one the bytes that its weights keep on this rank inside a real engine.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dsmixer.config.schema import BaseConfig
from dsmixer.model.inject import attach_mixers
from dsmixer.model.load import load_base
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.training.engine import start_engine
from dsmixer.training.optimizer import AdamSettings
from support.plan_bytes_ranks import MIXER, ds_config, kept_part

LARGE = ("none", "nf4")
SMALL = [
    (quantization, double, stage)
    for quantization, double in (("nf4", True), ("fp4", False))
    for stage in range(4)
]
EVERY_SECONDS = 0.01


def resident() -> dict[str, int]:
    """Bytes of this process by kind."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) * 1024
    return found


@contextmanager
def sampled(most: dict[str, int]) -> Iterator[None]:
    """Keep the highest figures seen meanwhile in ``most``."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(EVERY_SECONDS):
            for name, value in resident().items():
                most[name] = max(most.get(name, 0), value)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def give_back() -> None:
    """Freed memory goes back to the system, so that the next case starts from what is held."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def stored_bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Bytes of weights on this rank, scales of packed ones included."""
    tensors = []
    for parameter in parameters:
        # under ZeRO-3 small ones stay gathered beside their part
        tensors += [kept_part(parameter), parameter.data]
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
        if state is not None and state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def load_large(model: str, quantization: str) -> dict[str, int]:
    """Bytes of one load under ZeRO-3."""
    base = BaseConfig(model=model, quantization=quantization)
    give_back()
    before, most = resident()["RssAnon"], {}
    unset_hf_deepspeed_config()
    with sampled(most):
        loaded = load_base(base, zero3={"stage": 3})
    give_back()
    return {
        "peak": most["RssAnon"] - before,
        "after": resident()["RssAnon"] - before,
        "mapped": most["RssFile"],
        "stored": stored_bytes(loaded.model.parameters()),
    }


def keep_small(model: str, quantization: str, double: bool, stage: int) -> int:
    """Bytes of the base inside an engine that trains experts on it."""
    config = ds_config(stage, 1)
    base = BaseConfig(model=model, quantization=quantization, double_quantization=double)
    loaded = load_base(base, zero3=config["zero_optimization"] if stage == 3 else None)
    frozen = list(loaded.model.parameters())
    mixture = attach_mixers(loaded.model, MixerConfig(**MIXER))
    engine = start_engine(mixture, list(mixture.expert_parameters()), AdamSettings(), config)
    found = stored_bytes(frozen)
    engine.release()
    return found


def main(large: str, small: str, folder: Path) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    import bitsandbytes  # noqa: F401  its own memory is not the base's

    found = {
        "large": {quantization: load_large(large, quantization) for quantization in LARGE},
        "small": [keep_small(small, *case) for case in SMALL],
    }
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[-3:-1], Path(sys.argv[-1]))
