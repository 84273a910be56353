"""One rank of ``dist/test_scoring.py``: evaluates plainly and under ZeRO 2 and 3, and writes what it got."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmixer.data.domains import Domain
from dsmixer.data.records import Example
from dsmixer.evaluation.methods import evaluate_mixture
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from support.tiny import byte_tokenizer

SETTINGS = {"max_examples": None, "generate_max_new_tokens": 6, "exact_match": True, "batch_size": 2}


def wide_mixture() -> Mixture:
    """The same weights in every process; routers start wide, so that rounding flips no choice."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    mixture = attach_mixers(
        model, MixerConfig(["q", "v"], ["sums", "taste"], rank=8, alpha=16, router_std=1.0)
    )
    with torch.no_grad():
        for _, parameter in mixture.expert_parameters():
            parameter.normal_(0.0, 0.3)
    return mixture


def domains_for(texts: list[str]) -> list[Domain]:
    """Seven written answers, ``texts`` among them, and three choices: batches do not divide by ranks."""
    answers = [*texts, *(f" {i}" for i in range(7 - len(texts)))]
    sums = [Example(f"{i}+{i * i} =", text, "sums", location=f"sums:{i}") for i, text in enumerate(answers)]
    choices = (" good", " rather bad", " so")
    taste = [Example("film" * (i + 1), choices[i], "taste", choices, i, f"taste:{i}") for i in range(3)]
    return [Domain("sums", "sums", 1.0, sums, sums), Domain("taste", "taste", 1.0, taste, taste)]


def evaluate(model: nn.Module, texts: list[str]) -> dict[str, Any]:
    """What ``evaluate_mixture`` returns, and under ``texts`` what ``examples.json`` would hold."""
    tokenizer = byte_tokenizer()
    result = evaluate_mixture(
        model, tokenizer, domains_for(texts), SimpleNamespace(**SETTINGS), max_length=48
    )
    return {**result, "texts": result["routing"].examples.as_json(tokenizer)["texts"]}


def engine_of(model: nn.Module, stage: int) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    return engine


def main(folder: Path) -> None:
    texts = json.loads((folder / "texts.json").read_text())
    deepspeed.init_distributed("gloo", verbose=False)
    rank = dist.get_rank()
    found = {"plain": evaluate(wide_mixture().model, texts)}
    for stage in (2, 3):
        engine = engine_of(wide_mixture().model, stage)
        found[f"zero{stage}"] = evaluate(engine, texts)
        engine.destroy()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # the launcher puts --local_rank before the arguments
    main(Path(sys.argv[-1]))
