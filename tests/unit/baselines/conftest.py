"""A tiny base, mixtures on it, the same experts in PEFT, and rows of two domains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.tiny import byte_tokenizer, write_base
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.baselines.rows import training_rows
from dsmixer.data.domains import Domain
from dsmixer.data.records import Example
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixer_config import MixerConfig

NAMES = ("sums", "words", "spare")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a saved base; asked for twice, it is the same one."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_base(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def load_base(base_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """A fresh copy of a base, float32."""

    def load(kind: str) -> Any:
        auto_class = AutoModelForSeq2SeqLM if kind in ("t5", "flan") else AutoModelForCausalLM
        return auto_class.from_pretrained(base_folder(kind), dtype=torch.float32).eval()

    return load


@pytest.fixture(scope="session")
def make_mixture(load_base: Callable[[str], Any]) -> Callable[..., Mixture]:
    """A mixture whose experts say something, from the fields of a ``MixerConfig``."""

    def make(kind: str = "llama", **options: Any) -> Mixture:
        settings = {"targets": ["q", "v", "o"], "experts": NAMES, "rank": 4, "alpha": 6, **options}
        mixture = attach_mixers(load_base(kind), MixerConfig(**settings))
        stir(mixture)
        mixture.model.eval()
        return mixture

    return make


@torch.no_grad()
def stir(mixture: Mixture) -> None:
    """Experts whose products have one long direction, and smaller others; padding rows stay zero."""
    generator = torch.Generator().manual_seed(7)
    for mixer in mixture.mixers.values():
        for e, rank in enumerate(mixer.bank.ranks):
            sizes_R1 = torch.tensor([1.0] + [0.25] * (rank - 1))[:, None]
            for weight in (mixer.bank.lora_A, mixer.bank.lora_B):
                drawn = torch.randn(rank, weight.shape[2], generator=generator)
                weight[e, :rank] = 0.3 * sizes_R1 * drawn


@pytest.fixture
def in_peft(load_base: Callable[[str], Any], tmp_path: Path) -> Callable[..., tuple[Any, list[str]]]:
    """A mixture's experts as PEFT's own model has them, and their folders."""

    def convert(mixture: Mixture, kind: str = "llama") -> tuple[Any, list[str]]:
        save_mixture(mixture, tmp_path / "mixture", base="base")
        folders = [str(tmp_path / "mixture" / "experts" / name) for name in mixture.expert_names]
        (first, *rest), (folder, *others) = mixture.expert_names, folders
        model = PeftModel.from_pretrained(load_base(kind), folder, adapter_name=first)
        for name, other in zip(rest, others, strict=True):
            model.load_adapter(other, adapter_name=name)
        return model.eval(), folders

    return convert


def written(name: str, pairs: Sequence[tuple[str, str]]) -> list[Example]:
    return [Example(p, c, name, location=f"{name}:{i}") for i, (p, c) in enumerate(pairs)]


@pytest.fixture(scope="session")
def domains() -> list[Domain]:
    sums = written("sums", [(f"{a}+{b} =", f" {a + b}") for a in range(1, 4) for b in (7, 30)])
    words = written("words", [(f"{w}:", f" {w[::-1]}") for w in ("red", "tall", "house", "cat", "blue")])
    return [Domain("sums", "sums", 1.0, sums, sums[:4]), Domain("words", "words", 1.0, words, words[:3])]


@pytest.fixture(scope="session")
def rows(domains: list[Domain]) -> Any:
    """The training rows of both domains."""
    return training_rows(domains, byte_tokenizer(), max_length=32)


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(3, 259, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def logits_of(token_ids: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Logits of a model, under a context if one is given."""

    @torch.no_grad()
    def logits(model: Any, under: Any = None) -> torch.Tensor:
        if under is None:
            return model(token_ids).logits
        with under:
            return model(token_ids).logits

    return logits
