"""Combinations of base, ZeRO stage, placement and DeepSpeed file that can't work.

No base of these sites has weights: a message about the combination, and none about weights that are missing,
shows that it is found before anything is loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from support.bad_input import Site, Spoil
from support.tiny import write_base

COMBINATIONS: dict[str, Spoil] = {}
NF4 = "base.quantization=nf4"
QUANTISED: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
    },
}


def write_bases(folder: Path) -> Path:
    """A llama, and the same as others quantise it: configuration and tokenizer."""
    write_base(folder / "llama")
    (folder / "llama" / "model.safetensors").unlink()
    for name, stored in QUANTISED.items():
        shutil.copytree(folder / "llama", folder / name)
        path = folder / name / "config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "quantization_config": stored}))
    return folder


def overridden(name: str, overrides: tuple[str, ...], *says: str) -> None:
    """A combination made on the command line; the first override is the one that is named."""

    def spoil(site: Site) -> tuple[list[str], list[str]]:
        return site.train(*overrides), [f"command line: {overrides[0]}", *says]

    COMBINATIONS[name] = spoil


def in_ds_file(name: str, values: dict[str, Any], key: str, overrides: tuple[str, ...], *says: str) -> None:
    """A combination of the recipe and a DeepSpeed file, of which ``key`` is named with its line."""

    def spoil(site: Site) -> tuple[list[str], list[str]]:
        path = site.data("ds.json", json.dumps(values, indent=1))
        last = f'"{key.rsplit(".", 1)[-1]}"'
        line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if last in text)
        arguments = site.train(*overrides, "--deepspeed_config", str(path))
        return arguments, [f"{path}:{line}: {key}", *says]

    COMBINATIONS[name] = spoil


def on_base(name: str, base: str, overrides: tuple[str, ...], *says: str) -> None:
    """A combination of the recipe and a base that is quantised already."""

    def spoil(site: Site) -> tuple[list[str], list[str]]:
        site.change(f"{site.bases}/llama", f"{site.bases}/{base}")
        return site.train(*overrides), [f"{site.recipe}:", "base.model", "quantised already", *says]

    COMBINATIONS[name] = spoil


def zero(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": values}


CPU: dict[str, Any] = {"device": "cpu"}
BF16, OPEN = "base.dtype=bfloat16", "deepspeed.zero_stage=auto"

in_ds_file(
    "fp16 and a base in 4 bits",
    {"fp16": {"enabled": True}},
    "fp16.enabled",
    (NF4, BF16),
    "base.dtype: bfloat16",
)
in_ds_file(
    "gradients sent in fp16", {"communication_data_type": "fp16"}, "communication_data_type", (), "fp32"
)
in_ds_file(
    "bf16 and a float32 base", {"bf16": {"enabled": True}}, "bf16.enabled", (), "base.dtype", "'float32'"
)
in_ds_file("two ZeRO stages", zero(stage=3), "zero_optimization.stage", (), "zero_stage is 2", '"auto"')
in_ds_file(
    "parameters offloaded without ZeRO-3",
    zero(offload_param=CPU),
    "zero_optimization.offload_param.device",
    (NF4,),
    "by ZeRO stage 3 only, not 2",
    "zero_stage: 3",
)
in_ds_file(
    "optimizer offloaded with ZeRO-0",
    zero(offload_optimizer=CPU),
    "zero_optimization.offload_optimizer.device",
    ("deepspeed.zero_stage=0",),
    "ZeRO stage 0",
    "1, 2 or 3",
)
in_ds_file(
    "offload with the ZeRO stage left open",
    zero(offload_optimizer=CPU),
    "zero_optimization.offload_optimizer.device",
    (OPEN,),
    "left open",
    "write the stage",
)
in_ds_file(
    "nvme without a path",
    zero(stage=3, offload_param={"device": "nvme"}),
    "zero_optimization.offload_param.device",
    ("deepspeed.zero_stage=3",),
    "nvme_path is missing",
    "write cpu",
)
in_ds_file(
    "ZeRO++ on packed weights",
    zero(stage=3, zero_quantized_weights=True),
    "zero_optimization.zero_quantized_weights",
    ("deepspeed.zero_stage=3", NF4),
    "ZeRO++",
    "remove it",
)
overridden(
    "tokens with ZeRO-0", ("placement.mode=tokens", "deepspeed.zero_stage=0"), "ZeRO stage 0", "1, 2 or 3"
)
overridden("replicate with ZeRO-3", ("placement.mode=replicate", "deepspeed.zero_stage=3"), "weights or auto")
overridden("weights with ZeRO-2", ("placement.mode=weights", NF4), "ZeRO stage 3 only", "replicate or auto")
overridden(
    "experts spread in mode replicate",
    ("placement.expert_parallel_size=2", "placement.mode=replicate"),
    "tokens only",
    "placement.mode: tokens",
)
overridden(
    "more ranks a group than there are",
    ("placement.expert_parallel_size=2", "placement.mode=tokens", NF4),
    "divisor of 1",
)
overridden(
    "scales of a base that is not packed",
    ("base.double_quantization=false",),
    "base.quantization is none",
    "base.quantization: nf4",
)
overridden("flash attention in float32", ("base.attention=flash_attention_2", NF4), "float32", "sdpa")
overridden(
    "too little memory",
    ("placement.device_memory_gb=0.0001", NF4),
    "a rank needs",
    "placement.check_memory: false",
)
on_base("a base packed by GPTQ", "gptq", (), "by gptq", "its unquantised weights")
on_base("a base packed by AWQ, in NF4", "awq", (NF4,), "by awq", "its unquantised weights")
on_base("a base in 8 bits with ZeRO-3", "int8", ("deepspeed.zero_stage=3",), "to 8 bits", "ZeRO-3", "nf4")
on_base("an NF4 base in FP4", "nf4", ("base.quantization=fp4",), "to nf4", "base.quantization: nf4")
on_base("an NF4 base in its own type", "nf4", (), "to nf4", "double_quantization: false")
