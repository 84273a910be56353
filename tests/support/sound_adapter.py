"""A sound adapter, the model that it fits, and what it is to spoil it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG, SAFETENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
WIDTH, RANK = 16, 2
PATHS = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
FIRST = f"base_model.model.{PATHS[0]}.lora_A.weight"
FIRST_B = FIRST.replace("lora_A", "lora_B")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Hostile:
    """A folder to be refused.

    Attributes:
        name: what was done to it.
        make: does it, to a sound folder; the second argument is the file that must never be written.
        form: ``safetensors`` or ``pickle``, of the sound folder.
        expert: the name it is imported under.
        says: a pattern of the reasons that fit what was done.
    """

    name: str
    make: Callable[[Path, Path], object]
    form: str = "safetensors"
    expert: str = "law"
    says: str = ""


def base() -> LlamaForCausalLM:
    """The model that sound folders fit."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def sound_config() -> dict[str, Any]:
    """What PEFT would write beside :func:`sound_weights`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/some-model",
        "r": RANK,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


def sound_weights() -> Tensors:
    """Two factors for each of four projections."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}
    return {
        f"base_model.model.{path}.lora_{part}.weight": torch.randn(shape, generator=draw)
        for path in PATHS
        for part, shape in shapes.items()
    }


def write_sound(folder: Path, form: str = "safetensors") -> Path:
    """A folder that has nothing wrong with it."""
    folder.mkdir(parents=True)
    write_config(folder, sound_config())
    if form == "pickle":
        torch.save(sound_weights(), folder / PICKLE)
    else:
        save_file(sound_weights(), folder / SAFETENSORS, metadata={"format": "pt"})
    return folder


def write_config(folder: Path, values: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")
