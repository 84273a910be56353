"""PEFT's side of the comparison: each adapter alone, and Arrow over all of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, LoraConfig, PeftModel, create_arrow_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.bench.frozen_pool_adapters import SPECS
from tests.bench.frozen_pool_rows import NAMES, Pool

LARGEST_RANK = max(spec.rank for spec in SPECS)


def bare(pool: Pool) -> Any:
    """The base by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)


def lone_adapter(pool: Pool, name: str) -> nn.Module:
    """One adapter in PEFT, as it was saved."""
    return PeftModel.from_pretrained(bare(pool), pool.adapter(name))


def arrow_model(pool: Pool, top_k: int = 3) -> Any:
    """Arrow over copies of the adapters at one rank; three a token and temperature 1 are its defaults."""
    copies = [padded(pool.adapter(name), pool.out / "padded" / name, LARGEST_RANK) for name in NAMES]
    return create_arrow_model(
        bare(pool), [str(copy) for copy in copies], ArrowConfig(top_k=top_k, rng_seed=0)
    )


def arrow_refusal(pool: Pool) -> str:
    """What Arrow says to the adapters as they are."""
    try:
        create_arrow_model(bare(pool), [str(pool.adapter(name)) for name in NAMES], ArrowConfig(rng_seed=0))
    except ValueError as error:
        return str(error)
    return ""


def padded(folder: Path, out: Path, rank: int) -> Path:
    """The same adapter at a larger rank: rows of zeros in A, columns of zeros in B, alpha to match.

    Neither what it computes nor the singular vectors by which Arrow routes change.
    """
    config = LoraConfig.from_pretrained(folder)
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    missing = rank - config.r
    pad = nn.functional.pad
    tensors = {
        key: pad(tensor, (0, 0, 0, missing) if ".lora_A." in key else (0, missing)).contiguous()
        for key, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    config.r, config.lora_alpha, config.use_rslora = rank, scaling * rank, False
    config.save_pretrained(out)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out
