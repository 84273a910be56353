"""What the libraries say about this machine: ``python -m dsmixer.training.machine.probe STEP …``.

Runs in a process of its own, which prints the facts of each step as they come. A step that raises ends the
process, and what it raised is its finding: ``probing`` starts another one for the steps that are left.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

MARK = "dsmixer-probe: "
"""Before each line of facts: the libraries print on standard output too."""

NF4_BOUND = 0.1520
"""Half the widest gap between two NF4 values, those of -1 and -0.69619 (arXiv 2305.14314, appendix E): the
largest error in a block, over the block's largest magnitude."""

Facts = dict[str, Any]


def torch() -> Facts:
    """Its version and build, and how many GPUs it sees."""
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "count": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }


def devices() -> Facts:
    """Every GPU, whether each reaches the others' memory, and NCCL."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    peers = [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if count else None
    return {"gpus": [_gpu(index) for index in range(count)], "peers": peers, "nccl": nccl}


def _gpu(index: int) -> Facts:
    import torch

    properties = torch.cuda.get_device_properties(index)
    facts: Facts = {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "total": properties.total_memory,
    }
    try:
        facts["free"] = torch.cuda.mem_get_info(index)[0]
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=f"cuda:{index}")
        right = bool(((ones @ ones) == 16).all())
        facts["error"] = None if right else "a bfloat16 product came out wrong"
    except RuntimeError as error:  # no kernels for this GPU, no memory left, a GPU in a bad state
        facts["error"] = str(error).strip().splitlines()[0]
    return facts


def libraries(*names: str) -> Callable[[], Facts]:
    """A step that imports modules."""

    def step() -> Facts:
        for name in names:
            import_module(name)
        return {}

    return step


def deepspeed() -> Facts:
    """The device that it would train on."""
    import deepspeed  # noqa: F401  the whole package has to import
    from deepspeed.accelerator import get_accelerator

    return {"accelerator": get_accelerator().device_name()}


def ops() -> Facts:
    """What its op builder says of the ops that a run may build, and the CUDA toolkit that torch finds."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder
    from torch.utils.cpp_extension import CUDA_HOME

    adam = get_accelerator().create_op_builder("CPUAdamBuilder")
    return {
        "shared memory": ShareMemCommBuilder().is_compatible(verbose=False),
        "CPU Adam": adam is not None and adam.is_compatible(verbose=False),
        "cuda_home": CUDA_HOME,
    }


def nf4() -> Facts:
    """A small tensor to NF4 and back: the largest error of a block over the block's largest magnitude."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).to(device)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    error = (dequantize_4bit(packed, state) - weight).reshape(-1, 64).abs().amax(1)
    relative = float((error / weight.reshape(-1, 64).abs().amax(1)).max())
    return {"device": device, "error": relative, "bytes": packed.numel() * packed.element_size()}


STEPS: dict[str, tuple[Callable[[], Facts], tuple[str, ...]]] = {
    "torch": (torch, ()),
    "devices": (devices, ("torch",)),
    "safetensors": (libraries("safetensors.torch"), ("torch",)),
    "transformers": (libraries("transformers.models.llama.modeling_llama"), ("torch",)),
    "accelerate": (libraries("accelerate"), ("torch",)),
    "peft": (libraries("peft"), ("torch",)),
    "deepspeed": (deepspeed, ("torch",)),
    "ops": (ops, ("deepspeed",)),
    "bitsandbytes": (libraries("bitsandbytes"), ("torch",)),
    "nf4": (nf4, ("bitsandbytes",)),
}
"""Each step, in order, and the steps without which there is no use in it."""


if __name__ == "__main__":
    for name in sys.argv[1:]:
        facts = STEPS[name][0]()
        print(f"\n{MARK}{json.dumps({'step': name, 'facts': facts})}", flush=True)
