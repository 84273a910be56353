"""A tiny base with its tokenizer, and mixtures on it by PEFT's own calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.peft_mixtures import SETTINGS, stir
from support.tiny import write_base
from transformers import AutoModelForCausalLM

from dsmixer.model.inject import mixture_of
from dsmixer.peft import MixerConfig


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def made(base: Path) -> Callable[..., PeftModel]:
    """``get_peft_model`` on the base, experts with weights of their own unless ``fresh``."""

    def make(fresh: bool = False, **options: Any) -> PeftModel:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        found = get_peft_model(model, MixerConfig(**{**SETTINGS, **options}))
        if not fresh:
            stir(mixture_of(found))
        return found

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 250, (3, 10), generator=torch.Generator().manual_seed(1))
